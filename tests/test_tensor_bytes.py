"""The bytes of tensors; and that nothing here needs NumPy, which an installation of torch may lack."""

from __future__ import annotations

import struct
import subprocess
import sys

import torch

from checkpointless_elastic.tensor_bytes import to_bytes


def test_elements_come_in_row_order_whatever_the_memory_is() -> None:
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3)
    assert to_bytes(tensor.t()) == struct.pack("<6h", 0, 3, 1, 4, 2, 5)
    assert to_bytes(tensor[:, 1]) == struct.pack("<2h", 1, 4)
    assert to_bytes(torch.empty(0)) == b""


def test_a_conjugate_is_written_as_its_values() -> None:
    assert to_bytes(torch.tensor([1 + 2j]).conj()) == struct.pack("<2f", 1, -2)


def test_random_states_are_read_and_put_back_without_numpy() -> None:
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch\n"
        "from checkpointless_elastic.worker import generators, rng\n"
        "state = rng.capture(); first = torch.rand(3)\n"
        "rng.restore(state); assert torch.equal(first, torch.rand(3))\n"
        "generator = torch.Generator(); generators.write(generator, generators.read(generator))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
