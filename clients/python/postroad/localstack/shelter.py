"""As whom a server runs, and where its files lie so that this user can reach them.

PostgreSQL refuses to run as root. Started by root, the servers therefore run as the owner of their data, or
as `nobody` when they are new. That user often cannot reach the folder that was asked for (a checkout under
/root is closed to it): then data and a copy of the programs lie in a *shelter*, a folder that everybody may
pass through, and the folder that was asked for becomes a link into it. Ordinary users run everything as
themselves and never meet this.

Inputs are paths; outputs are the paths that count. Raises `LocalStackError` where a person has to decide.
What is interrupted half-way is found by the next start: copies are renamed into place only when they are
whole.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from postroad.localstack.errors import LocalStackError

# Kept over a reboot, unlike /tmp; the second where the first is read-only.
SHELTERS = (
    Path("/var/lib/postroad-local"),
    Path("/var/tmp/postroad-local"),  # noqa: S108 - shelter_folder() checks whose it is
)


@dataclass(frozen=True)
class Account:
    """A user of the operating system that a server runs as."""

    name: str
    uid: int
    gid: int


def serving_account(data_dir: Path, run_as: str | None) -> Account | None:
    """The user to switch to, or None to stay who we are (always, unless we are root)."""
    if os.geteuid() != 0:
        return None
    try:
        if run_as is not None:
            entry = pwd.getpwnam(run_as)
        elif data_dir.exists() and (owner := data_dir.stat().st_uid) != 0:
            entry = pwd.getpwuid(owner)
        else:
            entry = pwd.getpwnam("nobody")
    except KeyError as error:
        raise LocalStackError(
            f"PostgreSQL does not run as root, and the user to run it as has no passwd entry ({error})",
            "Add the user `nobody` to /etc/passwd, or start as an ordinary user",
        ) from error
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def is_reachable(path: Path, account: Account, *, wanted: int = stat.S_IXOTH) -> bool:
    """Whether `account` may pass through every folder down to `path` and has `wanted` (bits for others) on
    it.

    Looks at permission bits only: an access list that grants more costs us a copy, never a failure.
    """
    resolved = path.resolve()
    return all(_grants(parent, account, stat.S_IXOTH) for parent in resolved.parents) and _grants(
        resolved, account, wanted
    )


def _grants(path: Path, account: Account, wanted: int) -> bool:
    status = path.stat()
    if status.st_uid == account.uid:
        wanted <<= 6
    elif status.st_gid == account.gid:
        wanted <<= 3
    return status.st_mode & wanted == wanted


def settle_folder(data_dir: Path, account: Account | None, shelter: Path | None = None) -> Path:
    """Make `data_dir` exist, private to the serving user, and return where it really lies.

    A dangling link (its shelter was cleaned away) starts over; a folder with files in it is never moved.
    """
    if data_dir.is_symlink() and not data_dir.exists():
        data_dir.unlink()
    reachable = account is None or not data_dir.exists() or is_reachable(data_dir.resolve().parent, account)
    if not reachable and data_dir.is_dir() and not any(data_dir.iterdir()):
        data_dir.rmdir()  # made by a caller who could not know; there is nothing in it to move
    if not data_dir.exists():
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        if account is not None and not is_reachable(data_dir.parent, account):
            data_dir.symlink_to(_new_room(data_dir, shelter or shelter_folder()), target_is_directory=True)
        else:
            data_dir.mkdir()
    folder = data_dir.resolve()
    _check_owner(data_dir, folder)
    if account is not None:
        if not is_reachable(folder.parent, account):
            raise LocalStackError(
                f"{data_dir} exists, but the user {account.name} that the server runs as cannot reach it",
                "Open its parent folders for others (chmod o+x), or move it away to start with empty data",
            )
        os.chown(folder, account.uid, account.gid)
    folder.chmod(0o700)
    return folder


def _check_owner(data_dir: Path, folder: Path) -> None:
    owner = folder.stat().st_uid
    if os.geteuid() not in (0, owner):
        raise LocalStackError(
            f"{data_dir} belongs to another user (uid {owner})",
            "Start as that user or as root, or move the folder away to start with empty data",
        )


def shelter_folder() -> Path:
    """The first usable shelter, owned by us and open for passing through."""
    for folder in SHELTERS:
        try:
            folder.mkdir(exist_ok=True)
            status = folder.lstat()
            # Anybody may have made a folder of this name in /var/tmp; only our own can be trusted.
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                folder.chmod(0o711)
                return folder
        except OSError:
            continue
    raise LocalStackError(
        f"no folder that other users can reach could be made ({', '.join(map(str, SHELTERS))})",
        "Start as an ordinary user, or from a folder that every user may pass through",
    )


def _new_room(link: Path, shelter: Path) -> Path:
    _sweep(shelter)
    room = Path(tempfile.mkdtemp(prefix="data-", dir=shelter))
    room.chmod(0o711)
    (room / "link").write_text(str(link.absolute()), encoding="utf-8")
    inner = room / link.name
    inner.mkdir()
    return inner


def _sweep(shelter: Path) -> None:
    """Remove rooms whose link is gone or leads elsewhere: their checkout was deleted."""
    for room in shelter.glob("data-*"):
        try:
            link = Path((room / "link").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue  # being made at this moment
        if not (link.is_symlink() and link.resolve().parent == room.resolve()):
            shutil.rmtree(room, ignore_errors=True)


def remove_folder(data_dir: Path) -> None:
    """Delete `data_dir` and all in it, with the shelter's room when it is a link into one."""
    if data_dir.is_symlink():
        room = data_dir.resolve().parent
        data_dir.unlink()
        if room.name.startswith("data-") and (room / "link").exists():
            shutil.rmtree(room, ignore_errors=True)
    elif data_dir.exists():
        shutil.rmtree(data_dir)


def runnable_copy(source: Path, parts: tuple[str, ...], account: Account | None, shelter: Path | None = None) -> Path:
    """`source`, or a copy of its `parts` (paths relative to it) when `account` cannot reach them."""
    wanted = stat.S_IXOTH | stat.S_IROTH
    if account is None or all(is_reachable(source / part, account, wanted=wanted) for part in parts):
        return source
    # The name follows the content's age, so that an upgraded wheel gets a copy of its own.
    newest = max((source / part).stat().st_mtime_ns for part in parts)
    name = hashlib.sha256(f"{source}:{newest}".encode()).hexdigest()[:16]
    target = (shelter or shelter_folder()) / f"programs-{name}"
    if not target.exists():
        _copy_whole(source, parts, target)
    return target


def _copy_whole(source: Path, parts: tuple[str, ...], target: Path) -> None:
    making = Path(tempfile.mkdtemp(prefix="making-", dir=target.parent))
    try:
        for part in parts:
            destination = making / part
            destination.parent.mkdir(parents=True, exist_ok=True)
            if (source / part).is_dir():
                shutil.copytree(source / part, destination, ignore=shutil.ignore_patterns("*.a"))
            else:
                shutil.copy2(source / part, destination)
        _open_for_all(making)
        try:
            making.rename(target)
        except OSError:
            if not target.exists():  # else another process was quicker, and its copy is as good
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _open_for_all(folder: Path) -> None:
    """Give others what the owner may read and execute, whatever the umask was."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))
