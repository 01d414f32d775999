"""A file that holds no weights is refused with a hint, whatever its first bytes are."""

from pathlib import Path

import pytest
from torch import nn

from autoprune import load_weights_
from autoprune.errors import UsageError


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".csv"])
@pytest.mark.parametrize(
    "content",
    [b"", b"round,trial,top1\n1,0,0.97\n", b"q\x00", b"h\x05", b".", b"J", b"\x80\x02.", b"R"],
)
def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError):
        load_weights_(nn.Linear(2, 2), file)
