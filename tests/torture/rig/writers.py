"""What scripts do to files that were just saved: every way in which content, names and times can change.

A writer is a function of a path and a source of randomness, so that it can be named, sent to another process
and repeated. `FILE_WRITERS` take a regular file, `TREE_WRITERS` a directory, somewhere in which they choose.
None of them waits for anything but the kernel.
"""

import mmap
import os
import shutil
from pathlib import Path
from random import Random


def content(random: Random, size: int) -> bytes:
    """Bytes that differ everywhere from those of any other call; not aligned to pages."""
    block = random.randbytes(min(size, 61_441))
    return (block * (size // len(block) + 1))[:size] if size else b""


def rewrite(path: Path, random: Random) -> None:
    """What `torch.save` does: truncate in place, then write."""
    size = path.stat().st_size
    path.write_bytes(content(random, random.choice([size, size // 2, size + 4097])))


def rewrite_same_bytes(path: Path, random: Random) -> None:
    path.write_bytes(path.read_bytes())


def rewrite_keeping_times(path: Path, random: Random) -> None:
    info = path.stat()
    with path.open("r+b", buffering=0) as file:
        file.write(content(random, info.st_size))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def overwrite_a_part(path: Path, random: Random) -> None:
    size = path.stat().st_size
    offset = random.randrange(size + 1)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(content(random, min(100_000, max(1, size - offset))))


def append(path: Path, random: Random) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(content(random, random.choice([1, 5000, 200_000])))


def truncate(path: Path, random: Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def extend(path: Path, random: Random) -> None:
    os.truncate(path, path.stat().st_size + 1_000_000)


def replace(path: Path, random: Random) -> None:
    other = path.with_name(path.name + ".new")
    other.write_bytes(content(random, path.stat().st_size))
    other.replace(path)


def replace_keeping_times(path: Path, random: Random) -> None:
    other, info = path.with_name(path.name + ".new"), path.stat()
    other.write_bytes(content(random, info.st_size))
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.replace(path)


def remove(path: Path, random: Random) -> None:
    path.unlink()


def recreate_keeping_times(path: Path, random: Random) -> None:
    """A new file that is given the number of the old inode, on file systems that reuse them."""
    info = path.stat()
    path.unlink()
    path.write_bytes(content(random, info.st_size))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def store_through_a_map(path: Path, random: Random) -> None:
    size = path.stat().st_size
    if size == 0:
        append(path, random)
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for _ in range(20):
            offset = random.randrange(size)
            mapped[offset : offset + 10] = content(random, len(mapped[offset : offset + 10]))


def move_and_rewrite(path: Path, random: Random) -> None:
    moved = path.with_name(f"moved-{random.random()}")
    path.rename(moved)
    rewrite(moved, random)


def rewrite_through_a_link(path: Path, random: Random) -> None:
    other = path.with_name(path.name + ".link")
    os.link(path, other)
    rewrite_keeping_times(other, random)
    other.unlink()


def copy_over(path: Path, random: Random) -> None:
    other = path.with_name(path.name + ".source")
    other.write_bytes(content(random, path.stat().st_size + 1))
    shutil.copyfile(other, path)
    other.unlink()


def become_a_directory(path: Path, random: Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(content(random, 3000))


def become_a_link(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to(f"nowhere-{random.random()}")


def change_mode(path: Path, random: Random) -> None:
    path.chmod(random.choice([0o600, 0o640, 0o755]))


def change_time(path: Path, random: Random) -> None:
    os.utime(path, ns=(0, random.randrange(10**18)))


FILE_WRITERS = (
    rewrite,
    rewrite_same_bytes,
    rewrite_keeping_times,
    overwrite_a_part,
    append,
    truncate,
    extend,
    replace,
    replace_keeping_times,
    remove,
    recreate_keeping_times,
    store_through_a_map,
    move_and_rewrite,
    rewrite_through_a_link,
    copy_over,
    become_a_directory,
    become_a_link,
    change_mode,
    change_time,
)


def files_below(top: Path) -> list[Path]:
    """The regular files of a tree, sorted."""
    found = (Path(directory, name) for directory, _, names in os.walk(top) for name in names)
    return sorted(path for path in found if not path.is_symlink())


def choose_file(top: Path, random: Random) -> Path:
    return random.choice(files_below(top))


def choose_directory(top: Path, random: Random) -> Path:
    """Any directory below a directory, or itself."""
    return Path(random.choice(sorted(directory for directory, _, _ in os.walk(top))))


def change_a_file(top: Path, random: Random) -> None:
    random.choice(FILE_WRITERS)(choose_file(top, random), random)


def edit_keeping_everything(top: Path, random: Random) -> None:
    rewrite_keeping_times(choose_file(top, random), random)


def add_a_file(top: Path, random: Random) -> None:
    (choose_directory(top, random) / f"added-{random.random()}").write_bytes(content(random, 2000))


def add_a_directory(top: Path, random: Random) -> None:
    made = choose_directory(top, random) / f"made-{random.random()}"
    made.mkdir()
    (made / "inside").write_bytes(content(random, 100))


def remove_a_file(top: Path, random: Random) -> None:
    choose_file(top, random).unlink()


def rename_a_directory(top: Path, random: Random) -> None:
    chosen = choose_directory(top, random)
    if chosen != top:
        chosen.rename(chosen.with_name(f"renamed-{random.random()}"))


def swap_two_files(top: Path, random: Random) -> None:
    first, second = choose_file(top, random), choose_file(top, random)
    if first != second:
        between = first.with_name(first.name + ".between")
        first.rename(between)
        second.rename(first)
        between.rename(second)


def move_a_file(top: Path, random: Random) -> None:
    choose_file(top, random).rename(choose_directory(top, random) / f"moved-{random.random()}")


def exchange_a_directory_for_a_copy(top: Path, random: Random) -> None:
    """Same names, sizes and times; one file differs."""
    chosen = choose_directory(top, random)
    if chosen == top or not files_below(chosen):
        return
    copy = chosen.with_name(f"copy-{random.random()}")
    shutil.copytree(chosen, copy, symlinks=True)
    rewrite_keeping_times(choose_file(copy, random), random)
    shutil.rmtree(chosen)
    copy.rename(chosen)


def change_a_directory(top: Path, random: Random) -> None:
    chosen = choose_directory(top, random)
    random.choice([lambda: chosen.chmod(0o750), lambda: os.utime(chosen, ns=(0, 10**18 + 1))])()


def edit_through_an_outside_name(top: Path, random: Random) -> None:
    """Change a file of the tree through a hard link of it that lies elsewhere."""
    outside = top.with_name(top.name + ".outside")
    outside.mkdir(exist_ok=True)
    link = outside / f"{random.random()}"
    os.link(choose_file(top, random), link)
    for known in sorted(outside.iterdir()):
        rewrite_keeping_times(known, random)


TREE_WRITERS = (
    change_a_file,
    edit_keeping_everything,
    add_a_file,
    add_a_directory,
    remove_a_file,
    rename_a_directory,
    swap_two_files,
    move_a_file,
    exchange_a_directory_for_a_copy,
    change_a_directory,
    edit_through_an_outside_name,
)
BY_NAME = {writer.__name__: writer for writer in (*FILE_WRITERS, *TREE_WRITERS)}
