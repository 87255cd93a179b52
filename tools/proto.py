"""Everything that is made from proto/: `python tools/proto.py generate|check|lint|format`.

    generate   writes the Python code under clients/python/postroad/{control,config,node}, stale files removed
    check      generates into a scratch folder and fails with a list of the files that differ from the
    committed ones lint       `buf lint` and `buf format --diff` over proto/ format     `buf format --write`
    over proto/

Nothing is downloaded: Google's protos come from the locked googleapis-common-protos wheel and are copied into
the git-ignored .build/googleapis, protoc from grpcio-tools, buf from buf-bin. Exits 1 with the tool's own
message.
"""

from __future__ import annotations

import filecmp
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GOOGLEAPIS = ROOT / ".build" / "googleapis"
CLIENT = ROOT / "clients" / "python"
PROGRAMS = Path(sys.executable).parent
# The wheel ships this file under another name than the one it is imported by.
RENAMED = {"google/longrunning/operations_proto.proto": "google/longrunning/operations.proto"}
PACKAGE_DOCSTRING = '"""Generated from {source} by `make proto`; do not edit."""\n'


def copy_googleapis() -> None:
    """Bring .build/googleapis up to date with the wheel; other processes may be reading it meanwhile."""
    for file in importlib.metadata.files("googleapis-common-protos") or []:
        if file.suffix != ".proto":
            continue
        name = RENAMED.get(file.as_posix(), file.as_posix())
        source, target = Path(str(file.locate())), GOOGLEAPIS / name
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(source, scratch)
        scratch.replace(target)


def generate_into(folder: Path) -> None:
    """Run protoc with the plugins for messages, services and the types of both."""
    sources = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"--proto_path={PROTO}",
        f"--proto_path={GOOGLEAPIS}",
        f"--plugin=protoc-gen-mypy={PROGRAMS / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={PROGRAMS / 'protoc-gen-mypy_grpc'}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        f"--mypy_out=quiet:{folder}",
        f"--mypy_grpc_out=quiet:{folder}",
        *sources,
    ]
    subprocess.run(command, check=True)
    drop_empty_service_modules(folder, sources)
    for package in sorted({Path(source).parent for source in sources}):
        write_package(folder, package)


def drop_empty_service_modules(folder: Path, sources: list[str]) -> None:
    """Remove the `_pb2_grpc` files of protos without a service: there is nothing in them to import."""
    for source in sources:
        if "\nservice " not in (PROTO / source).read_text(encoding="utf-8"):
            for suffix in (".py", ".pyi"):
                (folder / f"{source.removesuffix('.proto')}_pb2_grpc{suffix}").unlink(missing_ok=True)


def write_package(folder: Path, package: Path) -> None:
    """Make `package` and its parents below `postroad` importable."""
    while package.name and package != Path("postroad"):
        text = PACKAGE_DOCSTRING.format(source=f"proto/{package.as_posix()}")
        (folder / package / "__init__.py").write_text(text, encoding="utf-8")
        package = package.parent


def generated_roots() -> list[str]:
    """The packages below `postroad` that are generated: `postroad/control` and its like."""
    return sorted(f"postroad/{path.name}" for path in (PROTO / "postroad").iterdir() if path.is_dir())


def generated_files(folder: Path) -> set[str]:
    """Relative paths of all generated files under `folder`."""
    return {
        path.relative_to(folder).as_posix()
        for root in generated_roots()
        for path in (folder / root).rglob("*.py*")
        if path.suffix in {".py", ".pyi"}
    }


def generate() -> int:
    """Replace the generated packages; a failure of protoc leaves the old ones as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate_into(fresh)
        for stale in generated_files(CLIENT) - generated_files(fresh):
            (CLIENT / stale).unlink()
        for name in generated_files(fresh):
            target = CLIENT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fresh / name, target)
    return 0


def check() -> int:
    """Compare the committed code with what proto/ says."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate_into(fresh)
        differing = sorted(
            name for name in generated_files(fresh) | generated_files(CLIENT) if not _same(fresh / name, CLIENT / name)
        )
    for name in differing:
        print(f"clients/python/{name} is not what proto/ says; run `make proto`")
    return 1 if differing else 0


def _same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and filecmp.cmp(left, right, shallow=False)


def lint() -> int:
    """The rules of buf.yaml, and buf's form."""
    return _buf("lint") or _buf("format", "proto", "--diff", "--exit-code")


def put_into_form() -> int:
    """Rewrite the protos in buf's form."""
    return _buf("format", "proto", "--write")


def _buf(*arguments: str) -> int:
    return subprocess.run([PROGRAMS / "buf", *arguments], cwd=ROOT, check=False).returncode


COMMANDS = {"generate": generate, "check": check, "lint": lint, "format": put_into_form}


def main() -> int:
    """Run the command that the first argument names."""
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    if not any(PROTO.rglob("*.proto")):
        return 0  # nothing to make anything from
    copy_googleapis()
    try:
        return COMMANDS[sys.argv[1]]()
    except subprocess.CalledProcessError as error:
        return error.returncode or 1


if __name__ == "__main__":
    sys.exit(main())
