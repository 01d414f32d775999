"""Encryption of a large delivered file: speed, and memory against the largest member.

    python benchmarks/bench_crypto.py                 # 2 GB of weights, results to benchmarks/results/
    python benchmarks/bench_crypto.py --keys-only --folder /dev/shm   # without the disk, and with less memory

Each operation runs in a process of its own, so that its peak memory can be read from the kernel (Linux).
"Memory" is that peak less what the process had before the operation, over the size of the largest member.
The rate over CPU time is what the machine does when nobody else is on it. The first row copies the file and
encrypts nothing: what disk and kernel give at that moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import headline

from autoprune.artifact.container import container_chunks
from autoprune.artifact.manifest import Architecture, Manifest, MemberDigest
from autoprune.artifact.reader import open_artifact
from autoprune.crypto.age import decrypt_file, decrypt_to_memory, encrypt_chunks
from autoprune.crypto.keys import keygen, recipients_of
from autoprune.files import write_chunks

WORD = "a passphrase"
MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation, measured once."""

    operation: str
    seconds: float
    mb_per_s: float
    mb_per_cpu_s: float
    memory_over_member: float


def make_file(folder: Path, size: int) -> None:
    """A container whose weights are `size` random bytes; the program is a stub that nobody loads here."""
    weights, program = os.urandom(size), b"not loaded in this benchmark"
    members = {"model.safetensors": weights, "model.pt2": program}
    digests = {n: MemberDigest(sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in members.items()}
    manifest = Manifest(name="large", architecture=Architecture(class_name="none"), members=digests)
    write_chunks(
        folder / "plain", container_chunks([("manifest.json", manifest.to_json().encode()), *members.items()])
    )


def from_memory(folder: Path) -> None:
    """What `write_artifact` does last: the members are in memory already."""
    data = (folder / "plain").read_bytes()
    encrypt_chunks(folder / "out", iter([data]), recipients=recipients_of(folder / "key"))


def encrypt_file(source: Path, target: Path, **key: Any) -> None:
    """From one file into another, a mebibyte at a time."""
    with source.open("rb") as stream:
        encrypt_chunks(target, iter(lambda: stream.read(1 << 20), b""), **key)


def to_memory(folder: Path) -> None:
    """What `load` does first."""
    with (folder / "locked").open("rb") as stream:
        decrypt_to_memory(stream, identity=folder / "key")


def opened(folder: Path) -> None:
    """Decrypted and every digest checked: all that happens before a tensor is built."""
    with open_artifact(folder / "locked", identity=folder / "key"):
        pass


def copied(folder: Path) -> None:
    """Read, written and flushed, and nothing else."""
    with (folder / "plain").open("rb") as stream:
        write_chunks(folder / "out", iter(lambda: stream.read(1 << 20), b""))


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "copy a file, for comparison": copied,
    "encrypt a file to a key": lambda f: encrypt_file(
        f / "plain", f / "out", recipients=recipients_of(f / "key")
    ),
    "encrypt from memory to a key": from_memory,
    "decrypt to a file": lambda f: decrypt_file(f / "locked", f / "out", identity=f / "key"),
    "decrypt to memory": to_memory,
    "open: decrypt to memory and check all digests": opened,
    "encrypt a file with a passphrase": lambda f: encrypt_file(f / "plain", f / "out", passphrase=WORD),
    "decrypt a passphrase file": lambda f: decrypt_file(f / "worded", f / "out", passphrase=WORD),
}


def memory_mb(kind: str) -> float:
    """`VmRSS`, what this process holds, or `VmHWM`, the most that it held since it was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024 / MB


def measure_here(operation: str, folder: Path) -> None:
    """In the child: run one operation; print seconds, CPU seconds and megabytes."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak, which exec inherits
    before, wall, cpu = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    OPERATIONS[operation](folder)
    done = time.perf_counter() - wall, time.process_time() - cpu, memory_mb("VmHWM") - before
    print(json.dumps(done))


def measure(operation: str, folder: Path, size: int) -> Row:
    """Run one operation in a child."""
    command = [sys.executable, __file__, "--operation", operation, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, cpu, used = json.loads(done.stdout)
    mb = size / MB
    return Row(
        operation=operation, seconds=seconds, mb_per_s=mb / seconds, mb_per_cpu_s=mb / cpu,
        memory_over_member=used / mb,
    )  # fmt: skip


def page(rows: list[Row], size: int, where: str) -> str:
    """The results as a page."""
    command = " ".join(["python benchmarks/bench_crypto.py", *sys.argv[1:]])
    lines = [
        f"# Encrypting {size / 1e9:.1f} GB of weights",
        "",
        headline("pyrage"),
        f"One run each, {where}; writing includes fsync.",
        "",
        f"    {command}",
        "",
        "| operation | seconds | MB/s | MB per CPU second | memory over member |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.operation} | {r.seconds:.1f} | {r.mb_per_s:.0f} | {r.mb_per_cpu_s:.0f} "
        f"| {r.memory_over_member:.2f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, run all operations, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-mb", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where to put the files (default: a temporary folder)")
    parser.add_argument("--keys-only", action="store_true", help="leave passphrases out: they need 6 GB")
    parser.add_argument("--operation", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "crypto.md")
    arguments = parser.parse_args()
    if arguments.operation:
        measure_here(arguments.operation, arguments.folder)
        return
    size = arguments.size_mb * MB
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_file(folder, size)
        encrypt_file(folder / "plain", folder / "locked", recipients=[keygen(folder / "key")])
        if not arguments.keys_only:
            encrypt_file(folder / "plain", folder / "worded", passphrase=WORD)
        rows = []
        for operation in OPERATIONS:
            if not (arguments.keys_only and "passphrase" in operation):
                rows.append(measure(operation, folder, size))
                (folder / "out").unlink(missing_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    where = f"files in {arguments.folder}" if arguments.folder else "files on the disk"
    arguments.out.write_text(page(rows, size, where), encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(arguments.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
