"""The Triton kernels in their interpreter, on any machine: values and all gradients against plain torch, in fp32.

Axes as in bench/kernels.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bench.compose import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CLOSE = 1e-5
CALLS = {
    "the shell": [["convolution"], ["norm"], ["model"]],
    "low rank": [["product"], ["mixer", "low_rank", {"rank": 4}]],
    "both directions": [["mixer", "quasiseparable", {"sam": True}], ["mixer", "add", {"sam": False, "heads": 2}]],
    "groups": [["mixer", "quasiseparable", {"sam": True, "groups": 2}], ["mixer", "semiseparable", {}]],
    "decay": [["mixer", "decay_attention", {"normalise": True, "feature_map": "elu1"}]],
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_a_kernel_is_plain_torch_in_values_and_all_gradients(calls):
    """In a process of its own, since Triton reads the switch of its interpreter when it is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_cases", json.dumps(calls)]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found and all(figure < CLOSE for figure in found.values()), found
