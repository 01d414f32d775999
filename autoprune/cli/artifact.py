"""The commands around the delivered file: `keygen inspect verify export encrypt decrypt rewrap`.

A secret is never an argument: a passphrase is asked for on the terminal or read from a file descriptor, a
key is named by its file. No file is overwritten.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli import completion
from autoprune.cli.run import ask_secret, read_secret, refuse_secrets
from autoprune.config import Protection
from autoprune.errors import ArtifactError, UsageError, VerificationError
from autoprune.serialization import json_text

if TYPE_CHECKING:
    from autoprune.artifact import Manifest
    from autoprune.crypto import AgeHeader

OPEN, PROTECT = "How to open the file", "Who may open the new file"
File = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A delivered file, encrypted or plain.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The new file.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
IdentityFile = Annotated[
    list[str] | None,
    typer.Option(
        "--identity", "-i", metavar="FILE", rich_help_panel=OPEN, show_default=False,
        help="An age identity file or OpenSSH private key; repeatable.  [default: your own key]",
    ),
]  # fmt: skip
Ask = Annotated[
    bool, typer.Option("--passphrase", rich_help_panel=OPEN, help="Ask for the file's passphrase.")
]
AskFd = Annotated[
    int | None,
    typer.Option(
        "--passphrase-fd", metavar="N", rich_help_panel=OPEN, help="Read it from file descriptor N."
    ),
]
Required = Annotated[
    str | None,
    typer.Option(
        "--require-signature", metavar="KEY|FILE", rich_help_panel=OPEN,
        help="Refuse the file unless this Ed25519 key (ssh-ed25519 ..., or its .pub file) has signed it.",
    ),
]  # fmt: skip
Recipients = Annotated[
    list[str] | None,
    typer.Option(
        "--recipient", "-r", metavar="KEY|FILE", rich_help_panel=PROTECT, show_default=False,
        help="An age or SSH public key, or a file of them; repeatable.  [default: your own key]",
    ),
]  # fmt: skip


class Form(StrEnum):
    """A form that a delivered file can be turned into."""

    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"
    sparse = "sparse"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    examples: dict[Any, tuple[str, ...]] = {
        inspect: ("inspect runs/digits/model.autoprune.age", "inspect model.autoprune.age -i key.txt --json"),
        verify: (
            "verify runs/digits/model.autoprune.age",
            "verify model.autoprune.age --require-signature ann.pub",
        ),
        export: (
            "export model.autoprune.age --to onnx -o model.onnx",
            "export model.autoprune.age --to safetensors -i key.txt -o model.safetensors",
        ),
        encrypt: (
            "encrypt model.autoprune -o model.autoprune.age",
            "encrypt model.autoprune -r age1... --sign signing_key -o model.autoprune.age",
        ),
        decrypt: ("decrypt model.autoprune.age -o model.autoprune",),
        rewrap: (
            "rewrap model.autoprune.age -r age1... -o theirs.autoprune.age",
            "rewrap model.autoprune.age --new-passphrase -o new.autoprune.age",
        ),
        keygen: ("keygen", "keygen key.txt", "keygen --signing signing_key"),
    }  # fmt: skip
    for command, lines in examples.items():
        app.command(rich_help_panel="Deliver", epilog=completion.examples(*lines))(command)


@dataclass(frozen=True, kw_only=True)
class Opener:
    """The keys or the passphrase with which a file is to be opened."""

    identity: list[str] | None
    passphrase: str | None

    @property
    def is_given(self) -> bool:
        """Whether the user named a key or gave a passphrase."""
        return self.identity is not None or self.passphrase is not None


def _opener(file: Path, identity: list[str] | None, ask: bool, descriptor: int | None) -> Opener:
    from autoprune.crypto import is_encrypted, open_file, read_header

    if sum((bool(identity), ask, descriptor is not None)) > 1:
        raise UsageError("a file is opened by keys or by a passphrase, not both", "give one of the two")
    refuse_secrets(identity or ())
    if descriptor is not None:
        return Opener(identity=None, passphrase=read_secret(descriptor))
    if not ask and not identity and sys.stdin.isatty():
        with open_file(file) as stream:
            ask = is_encrypted(stream) and read_header(stream).by_passphrase
    secret = ask_secret("Passphrase of the file") if ask else None
    return Opener(identity=identity or None, passphrase=secret)


def _new_protection(recipients: list[str] | None, ask: bool, descriptor: int | None) -> Protection:
    from autoprune.crypto import check_protection, default_recipient

    if sum((bool(recipients), ask, descriptor is not None)) > 1:
        raise UsageError(
            "a file is encrypted to keys or with a passphrase, not both", "choose one of the two"
        )
    secret = None
    if descriptor is not None:
        secret = read_secret(descriptor)
    elif ask:
        secret = ask_secret("New passphrase", twice=True)
    keys = tuple(recipients or ()) if recipients or secret is not None else (default_recipient(),)
    check_protection(keys, secret)
    return Protection(recipients=keys, passphrase=secret)


def _check_new(file: Path) -> None:
    if file.exists():
        raise UsageError(f"{file} exists, and nothing is overwritten", "choose another name with -o")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def keygen(
    file: Annotated[Path | None, typer.Argument(
        metavar="FILE", show_default=False,
        help="Where the secret goes.  [default: your own key's place]")] = None,
    signing: Annotated[bool, typer.Option(
        "--signing", help="A key that signs (Ed25519), not one that opens.")] = False,
) -> None:  # fmt: skip
    """Make a key; its public half is printed, the secret stays in a file that only you can read."""
    from autoprune.crypto import default_identity_path, signing_keygen
    from autoprune.crypto import keygen as make_identity

    path = file or default_identity_path()
    if signing:
        path = file or path.with_name("signing_key")
    public = signing_keygen(path) if signing else make_identity(path)
    sys.stdout.write(public + "\n")
    _say(f"the secret half is in {path}: keep it, nobody can replace it")


def inspect(
    file: File,
    identity: IdentityFile = None,
    passphrase: Ask = False,
    passphrase_fd: AskFd = None,
    require_signature: Required = None,
    as_json: AsJson = False,
) -> None:
    """Show what a delivered file is: its recipients without a key, all of its manifest with one."""
    from autoprune.artifact import open_artifact
    from autoprune.crypto import is_encrypted, open_file, read_header

    opener = _opener(file, identity, passphrase, passphrase_fd)
    with open_file(file) as stream:
        header = read_header(stream) if is_encrypted(stream) else None
    manifest, signer = None, None
    try:
        with open_artifact(
            file, identity=opener.identity, passphrase=opener.passphrase, require_signature=require_signature
        ) as artifact:
            manifest, signer = artifact.manifest, artifact.signer
    except (ArtifactError, UsageError):
        if header is None or opener.is_given or require_signature is not None:
            raise
    _show(file, header, manifest, signer, as_json=as_json)


def _show(
    file: Path, header: AgeHeader | None, manifest: Manifest | None, signer: str | None, *, as_json: bool
) -> None:
    if as_json:
        document: dict[str, Any] = {
            "file": str(file),
            "size_bytes": file.stat().st_size,
            "recipients": None if header is None else list(header.kinds),
            "signer": signer,
            "manifest": None if manifest is None else json.loads(manifest.to_json()),
        }
        sys.stdout.write(json_text(document, indent=1) + "\n")
        return
    from autoprune.artifact import artifact_text

    sys.stdout.write(artifact_text(file, header, manifest, signer))


def verify(
    file: File,
    identity: IdentityFile = None,
    passphrase: Ask = False,
    passphrase_fd: AskFd = None,
    require_signature: Required = None,
    as_json: AsJson = False,
) -> None:
    """Check a delivered file: digests, signature, and that all of its forms compute the same.

    Where the original's class can be imported, the network is also built again from original and plan.
    """
    from autoprune.artifact import open_artifact

    opener = _opener(file, identity, passphrase, passphrase_fd)
    with open_artifact(
        file, identity=opener.identity, passphrase=opener.passphrase, require_signature=require_signature
    ) as artifact:
        from autoprune.artifact import verify_artifact

        checks = verify_artifact(artifact)
    if as_json:
        sys.stdout.write(json_text(checks, indent=1) + "\n")
    else:
        words = {True: "ok", False: "FAILED", None: "-"}
        sys.stdout.writelines(f"{c.name:<10} {words[c.passed]:<7} {c.detail}\n" for c in checks)
    failed = [c.name for c in checks if c.passed is False]
    if failed:
        raise VerificationError(f"{file} does not hold together: {', '.join(failed)}", "get the file again")


def export(
    file: File,
    to: Annotated[Form, typer.Option(
        help="onnx, pt2 (torch.export), safetensors, or sparse: in the original's shapes, with zeros.")],
    out: Out,
    identity: IdentityFile = None,
    passphrase: Ask = False,
    passphrase_fd: AskFd = None,
    require_signature: Required = None,
) -> None:  # fmt: skip
    """Take one form of the network out of a delivered file, in plaintext."""
    from autoprune.artifact import open_artifact
    from autoprune.files import write_chunks

    _check_new(out)
    opener = _opener(file, identity, passphrase, passphrase_fd)
    with open_artifact(
        file, identity=opener.identity, passphrase=opener.passphrase, require_signature=require_signature
    ) as artifact:
        if to is Form.sparse:
            from autoprune.artifact import sparse_safetensors

            data = sparse_safetensors(artifact)
        else:
            data = artifact.member(f"model.{to.value}")
    write_chunks(out, [data])
    _say(f"{out}: {len(data)} bytes, not encrypted")


def encrypt(
    file: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A plain delivered file.")],
    out: Out,
    recipient: Recipients = None,
    passphrase: Annotated[bool, typer.Option(
        "--passphrase", rich_help_panel=PROTECT, help="Ask for a passphrase, twice.")] = False,
    passphrase_fd: Annotated[int | None, typer.Option(
        metavar="N", rich_help_panel=PROTECT, help="Read the passphrase from file descriptor N.")] = None,
    sign: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Sign it with this Ed25519 secret key (OpenSSH or PEM) first.")] = None,
) -> None:  # fmt: skip
    """Encrypt a plain delivered file, after checking it."""
    from autoprune.artifact import member_chunks, open_artifact
    from autoprune.crypto import encrypt_chunks

    _check_new(out)
    with open_artifact(file) as artifact:
        if artifact.header is not None:
            raise UsageError(f"{file} is encrypted already", "autoprune rewrap changes who may open it")
        protection = _new_protection(recipient, passphrase, passphrase_fd)
        chunks = member_chunks(artifact, signing_key=sign)
        encrypt_chunks(out, chunks, recipients=protection.recipients, passphrase=protection.passphrase)
    _say(f"{out}: encrypted")


def decrypt(
    file: File, out: Out, identity: IdentityFile = None, passphrase: Ask = False, passphrase_fd: AskFd = None
) -> None:
    """Write the plain form of an encrypted file."""
    from autoprune.crypto import decrypt_file

    _check_new(out)
    opener = _opener(file, identity, passphrase, passphrase_fd)
    decrypt_file(file, out, identity=opener.identity, passphrase=opener.passphrase)
    _say(f"{out}: not encrypted")


def rewrap(
    file: File,
    out: Out,
    identity: IdentityFile = None,
    passphrase: Ask = False,
    passphrase_fd: AskFd = None,
    recipient: Recipients = None,
    new_passphrase: Annotated[bool, typer.Option(
        "--new-passphrase", rich_help_panel=PROTECT, help="Ask for the new passphrase, twice.")] = False,
    new_passphrase_fd: Annotated[int | None, typer.Option(
        metavar="N", rich_help_panel=PROTECT, help="Read the new passphrase from file descriptor N.")] = None,
) -> None:  # fmt: skip
    """Encrypt an encrypted file for others, through memory; the old file stays."""
    from autoprune.crypto import rewrap_file

    _check_new(out)
    opener = _opener(file, identity, passphrase, passphrase_fd)
    protection = _new_protection(recipient, new_passphrase, new_passphrase_fd)
    rewrap_file(
        file, out, recipients=protection.recipients, new_passphrase=protection.passphrase,
        identity=opener.identity, passphrase=opener.passphrase,
    )  # fmt: skip
    _say(f"{out}: encrypted anew; whoever could open {file} still can open that one")
