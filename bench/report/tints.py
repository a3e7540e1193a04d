"""Tints: the colours of several arms of one mixer, by their contrast with white paper (WCAG 2's ratio), and their name.

By contrast and not by a share of the colour, so that none is lost on the paper, whether its colour is dark or light.
"""

# Of the first arm, and at least of the last: light colours go on into the dark, for above PALEST they have no room.
PALEST, DARKEST = 2.2, 4
STEPS = range(-255, 256)  # from black by way of the colour to white


def tinted(colour: str, share: float) -> str:
    """The colour mixed with white or black: its contrast with white goes from the palest at 0 to the darkest at 1."""
    most = max(DARKEST, contrast(colour))
    goal = PALEST * (most / PALEST) ** share
    return min((mixed(colour, step / 255) for step in STEPS), key=lambda tint: abs(contrast(tint) - goal))


def mixed(colour: str, white: float) -> str:
    """With that share of white, or if it is negative of black."""
    target = 255 if white > 0 else 0
    return "#" + "".join(f"{round(part + abs(white) * (target - part)):02X}" for part in parts(colour))


def contrast(colour: str) -> float:
    """With white paper, 1 to 21."""
    shares = [part / 255 for part in parts(colour)]
    lights = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = sum(weight * light for weight, light in zip((0.2126, 0.7152, 0.0722), lights, strict=True))
    return 1.05 / (luminance + 0.05)


def parts(colour: str) -> list[int]:
    """Of #RRGGBB."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def families(labels: list[str]) -> list[tuple[int, str]]:
    """(Place of an arm, its name in a legend). Of one mixer's arms whose names differ in one key first, the last stands
    for all: 'attention SAM, pale to dark: heads 1, 2'.
    """
    groups: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label.partition(", ")[0], []).append(place)
    found = []
    for head, places in groups.items():
        firsts = [labels[p].removeprefix(f"{head}, ").partition(", ")[0].rpartition(" ") for p in places]
        keys, values = {key for key, _, _ in firsts}, [value for _, _, value in firsts]
        if len(places) > 1 and len(keys) == 1 and len(set(values)) == len(places):
            found.append((places[-1], f"{head}, pale to dark: {keys.pop()} {', '.join(values)}"))
        else:
            found += [(place, labels[place]) for place in places]
    return found
