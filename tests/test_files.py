"""Files are replaced whole and read within bounds, and killed writers leave nothing for good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from metatutor import files
from metatutor.files import expanded, one_line, replacing

# Programs of other processes; they import the file alone, without the package and torch.
KILLED = """
with replacing(Path(sys.argv[2])) as temporary:
    temporary.write_text("half")
    print(flush=True)
    sys.stdin.read()
"""
WRITING = """
for _ in range(30):
    with replacing(Path(sys.argv[2])) as temporary:
        temporary.write_text(sys.argv[3] * 100_000)
"""
IMPORTS = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from files import replacing\n"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", IMPORTS + program, str(Path(files.__file__).parent), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def killed(path: Path) -> str:
    """The name of the file that a killed writer leaves."""
    before = set(names(path.parent))
    with start(KILLED, str(path)) as process:
        assert process.stdout and process.stdout.readline()
        process.kill()
    (left,) = set(names(path.parent)) - before
    return left


def test_a_file_is_replaced_at_the_end_only(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_missing_folder_is_made(tmp_path):
    with replacing(tmp_path / "new" / "folder" / "file"):
        pass
    assert names(tmp_path / "new" / "folder") == ["file"]


def test_what_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "in\nthe way").touch()
    with pytest.raises(ValueError) as caught, replacing(tmp_path / "in\nthe way" / "file", " (try CACHE)"):
        pytest.fail("nothing can be written there")
    assert re.fullmatch(
        r"cannot write file in .*in\?the way \(.+\); make that folder writable, with space to spare, or choose another "
        r"one \(try CACHE\); nothing was changed",
        str(caught.value),
    )
    with pytest.raises(ValueError, match="cannot write x"), replacing(tmp_path / ("x" * 300)):
        pass


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"cannot write file .*\(No space left on device\)"), replacing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "[odd] name"
    for _ in range(2):
        assert killed(path)
    assert len(names(tmp_path)) == 1, "the second found what the first left"
    with replacing(path):
        pass
    assert names(tmp_path) == [path.name]


def test_writers_leave_each_other_alone(tmp_path):
    path = tmp_path / "file"
    with start(KILLED, str(path)) as other:
        assert other.stdout and other.stdout.readline()
        with replacing(path) as one, replacing(path) as two:
            assert len(names(tmp_path)) == 3 and one.exists() and two.exists()
        assert len(names(tmp_path)) == 2, "the file, and what the other is writing"
        other.kill()


def test_other_files_are_left_alone(tmp_path):
    other = killed(tmp_path / "file.pt")
    for name in ("file.tmp", "file.123.tmp", "file.backup.tmp"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "file"):
        pass
    assert names(tmp_path) == sorted(["file", "file.123.tmp", "file.backup.tmp", "file.tmp", other])


def test_an_earlier_process_of_the_same_number_is_dead(tmp_path):
    path = tmp_path / "file"
    (tmp_path / f"file.{files._processes()}-{os.getpid()}-01234567.tmp").touch()
    with replacing(path):
        pass
    assert names(tmp_path) == ["file"]


def test_temporary_files_of_other_machines_are_left_for_an_hour(tmp_path):
    new, old = (tmp_path / f"file.00000000-{number}-01234567.tmp" for number in (1, 2))
    for file, age in ((new, 600), (old, 6000)):
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    with replacing(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file", new.name]


def test_many_writers_at_once_leave_one_whole_file(tmp_path):
    path, barrier = tmp_path / "file", Barrier(4)

    def write(letter: str) -> None:
        barrier.wait()
        for _ in range(50):
            with replacing(path) as temporary:
                temporary.write_text(letter * 100_000)

    others = [start(WRITING, str(path), letter) for letter in "AB"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert [other.wait() for other in others] == [0, 0]
    text = path.read_text()
    assert text == text[0] * 100_000
    assert names(tmp_path) == ["file"]


# --- messages, names, folders ---


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("Grüße – 字, a\nb\x1b[31m") == "Grüße – 字, a?b?[31m"
    message = one_line("what " + "x" * 10**6 + " to do")
    assert len(message) == 2000 and message.startswith("what ") and message.endswith(" to do")


def test_a_home_of_nobody_is_named():
    assert expanded("~", "SOMEWHERE") == Path.home()
    with pytest.raises(ValueError, match=r"SOMEWHERE is ~nobody-here/data: there is no such user"):
        expanded("~nobody-here/data", "SOMEWHERE")


def test_folders_are_listed_up_to_a_bound(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    assert len(files.entries(tmp_path)) == 4
    monkeypatch.setattr(files, "_MOST_FILES", 3)
    with pytest.raises(ValueError, match="more than 3 files"):
        files.entries(tmp_path)


def test_a_folder_that_cannot_be_read_is_an_error_and_not_empty(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.entries(tmp_path / "nowhere")
