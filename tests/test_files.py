import os
import shutil
from pathlib import Path

import pytest

from sam3_hf import files


def folder_with(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    (path / "state").write_text(content)
    return path


def content_of(path: Path) -> str:
    return (path / "state").read_text()


def fail(*_):
    raise OSError("disk full")


@pytest.mark.parametrize("call", range(8))
def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path, monkeypatch, call):
    """Stops `put_in_place` before each of its system calls in turn; what is left must be the old or the new one."""
    folder_with(tmp_path / "last", "old")
    folder_with(tmp_path / ".last.partial", "new")
    calls = 0

    def counted(function):
        def stop_or_go(*args, **kwargs):
            nonlocal calls
            if calls == call:
                raise SystemExit("killed")
            calls += 1
            return function(*args, **kwargs)

        return stop_or_go

    for module, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    try:
        files.put_in_place(tmp_path / ".last.partial", tmp_path / "last")
        finished = True
    except SystemExit:
        finished = False
    monkeypatch.undo()
    files.recover(tmp_path)
    assert content_of(tmp_path / "last") in (("new",) if finished else ("old", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert finished == (call >= 7)  # so that the cases cover all calls: 3 + 1 fsync, 2 renames, 1 rmtree


def test_one_name_is_recovered_and_the_others_are_left(tmp_path):
    for name in ("[a]", "a"):
        folder_with(tmp_path / f".{name}.previous", "old")
    files.recover(tmp_path, "[a]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.previous", "[a]"]


def test_copies_share_files_and_survive_the_next_write(tmp_path):
    last = folder_with(tmp_path / "last", "first")
    files.copy_folder(last, tmp_path / "best")
    assert (last / "state").samefile(tmp_path / "best" / "state")
    files.write_folder(last, lambda folder: (folder / "state").write_text("second"))
    assert (content_of(last), content_of(tmp_path / "best")) == ("second", "first")
    files.write_file(tmp_path / "best" / "state", "third")
    files.copy_folder(tmp_path / "best", tmp_path / "other")
    files.write_file(tmp_path / "best" / "state", "fourth")
    assert content_of(tmp_path / "other") == "third"


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    last = folder_with(tmp_path / "last", "old")
    with pytest.raises(OSError, match="full"):
        files.write_folder(last, fail)
    assert content_of(last) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "notes").write_text("text")
    with pytest.raises(NotADirectoryError, match="notes is a file"):
        files.write_folder(tmp_path / "notes", lambda folder: None)
    assert (tmp_path / "notes").read_text() == "text"


def test_a_link_to_a_folder_stays_one(tmp_path):
    folder_with(tmp_path / "disk" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    files.write_folder(tmp_path / "model", lambda folder: (folder / "state").write_text("new"))
    assert (tmp_path / "model").is_symlink() and content_of(tmp_path / "disk" / "model") == "new"


@pytest.mark.parametrize("content", ["grün\n", "grün\n".encode(), lambda path: path.write_bytes("grün\n".encode())])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, content):
    path = tmp_path / "new" / "file.txt"
    files.write_file(path, content)
    assert path.read_bytes() == "grün\n".encode()
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        files.write_file(path, content)
    assert path.read_text() == "old"
    assert [path.name for path in path.parent.iterdir()] == ["file.txt"]


def test_two_processes_write_one_file(tmp_path):
    """The second starts and ends while the first writes."""
    target = tmp_path / "file"

    def slowly(partial):
        partial.write_text("first, be")
        files.write_file(target, "second", mark="b")
        assert target.read_text() == "second"
        partial.write_text("first")

    files.write_file(target, slowly, mark="a")
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]
