"""When the native library is compiled, when it is found, and the errors if it cannot be."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from kernels.native import build
from kernels.native.build import (
    AVX2,
    AVX512,
    X86_VARIANTS,
    NativeUnavailableError,
    Variant,
    build_library,
    find_compiler,
    prebuild,
)

Command = tuple[str, ...]
# A fast fake compiler: it writes its arguments into what it makes, and what it links after them.
WRITE = (
    "parts = [open(name).read() for name in sys.argv[1:-1] if name.endswith('.o')]\n"
    "open(sys.argv[-1], 'w').write(' '.join([*sys.argv, *parts]))"
)
# A compiler that fails and leaves half a library.
FAIL = (
    "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write('half')\n"
    "sys.exit('In file a.cpp:\\na.cpp:7:1: error: no such instruction\\nmore')"
)


def python(code: str) -> Command:
    """A compiler made of a Python program. It must also accept `--version`."""
    return (
        sys.executable,
        "-IS",
        "-c",
        f"import sys\nif '--version' in sys.argv: sys.exit()\n{code}",
    )


def use(monkeypatch: pytest.MonkeyPatch, compiler: Command | None) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_library_of_this_machine_is_compiled_once(native_cache: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler here")
    first = build_library(native_cache)
    written = first.stat()
    again = build_library(native_cache)
    assert again == first
    assert (again.stat().st_mtime_ns, again.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    assert first.read_bytes()[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    assert not list(first.parent.glob("compiling-*"))


def test_every_source_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, python(WRITE))
    command = build_library(tmp_path).read_text().split()
    assert {"-O3", "-shared", "-std=c++20", "-march=native"} <= set(command)
    compiled = {word for word in command if word.endswith(".cpp")}
    assert compiled == {str(path) for path in build.PACKAGE.rglob("*.cpp")}


def test_an_existing_library_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(WRITE))
    path = build_library(tmp_path)
    path.write_text("kept")
    assert build_library(tmp_path) == path
    assert path.read_text() == "kept"


def test_every_input_of_a_library_changes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(WRITE))
    paths = [build_library(tmp_path)]
    monkeypatch.setattr(build, "cpu_name", lambda: "another CPU")
    paths.append(build_library(tmp_path))
    monkeypatch.setattr(build, "_sources_key", lambda: "other sources")
    paths.append(build_library(tmp_path))
    assert len(set(paths)) == 3
    assert all(path.is_file() for path in paths)


def test_a_compiled_library_is_found_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(WRITE))
    path = build_library(tmp_path)
    use(monkeypatch, None)
    assert build_library(tmp_path, tmp_path / "nothing-prebuilt") == path


@pytest.mark.parametrize("name", ["norm/kernel.cpp", "native/vector.h"])
def test_the_key_of_the_sources_changes_with_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    key = build._sources_key.__wrapped__
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    path = tmp_path / name
    path.parent.mkdir()
    keys = [key()]
    for text in ("", "// a", "// b"):
        path.write_text(text)
        keys.append(key())
    path.rename(path.with_stem("renamed"))
    keys.append(key())
    assert len(set(keys)) == 5
    path.with_name("notes.txt").write_text("not a source")
    assert key() == keys[-1]


def test_a_failing_compiler_is_quoted_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(FAIL))
    with pytest.raises(NativeUnavailableError, match=r"failed: a\.cpp:7:1: error: no such"):
        build_library(tmp_path)
    assert files(tmp_path) == ["kernels"]


@pytest.mark.parametrize(
    ("code", "message"),
    [("sys.exit(3)", "failed: no message"), ("sys.exit('out of memory')", "failed: out of memory")],
)
def test_a_compiler_that_fails_in_other_words_is_quoted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    use(monkeypatch, python(code))
    with pytest.raises(NativeUnavailableError, match=message):
        build_library(tmp_path)


def test_a_compiler_that_writes_nothing_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python("pass"))
    with pytest.raises(NativeUnavailableError, match="compiling into"):
        build_library(tmp_path)
    assert files(tmp_path) == ["kernels"]


def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, python("import threading; threading.Event().wait()"))
    monkeypatch.setattr(build, "TIMEOUT", 0.2)
    with pytest.raises(NativeUnavailableError, match="timed out"):
        build_library(tmp_path)
    assert files(tmp_path) == ["kernels"]


def test_a_compiler_that_cannot_be_started_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, (str(tmp_path / "gone"),))
    with pytest.raises(NativeUnavailableError, match="gone"):
        build_library(tmp_path)


def test_without_a_compiler_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, None)
    for refused in (
        lambda: build_library(tmp_path, tmp_path),
        lambda: prebuild(build.variants()[0], tmp_path),
    ):
        with pytest.raises(NativeUnavailableError) as caught:
            refused()
        for word in ("c++", "g++", "clang++", "pip install ziglang"):
            assert word in str(caught.value)
    assert files(tmp_path) == []


@pytest.fixture(scope="module")
def every_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libraries for every x86-64 CPU."""
    folder = tmp_path_factory.mktemp("prebuilt")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, python(WRITE))
        for variant in X86_VARIANTS:
            prebuild(variant, folder)
    return folder


@pytest.fixture
def ahead(every_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with those libraries; the compiler is gone."""
    monkeypatch.setattr(build, "variants", lambda: X86_VARIANTS)
    use(monkeypatch, None)
    return shutil.copytree(every_library, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"lm"}, "sse2"),
        (AVX2, "avx2"),
        (AVX2 - {"fma"}, "sse2"),
        (AVX512, "avx512"),
        (AVX512 | {"amx_tile"}, "avx512"),
        (AVX512 | {"avx512_vnni"}, "avx512vnni"),
        (AVX512 | {"avx512_bf16"}, "avx512"),
        (AVX512 | {"avx512_vnni", "avx512_bf16"}, "avx512bf16"),
        (AVX2 | {"avx_vnni"}, "avxvnni"),
        (AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"}, "avx512bf16"),
        (AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"}, "amx"),
    ],
    ids=[
        "oldest",
        "avx2",
        "avx2-without-fma",
        "avx512",
        "half-of-amx",
        "avx512vnni",
        "bf16-without-vnni",
        "avx512bf16",
        "avxvnni",
        "amx-without-bytes",
        "amx",
    ],
)
def test_without_a_compiler_the_best_library_that_runs_here_is_taken(
    ahead: Path, monkeypatch: pytest.MonkeyPatch, flags: set[str], name: str
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags))
    cache = ahead / "cache"
    path = build_library(cache, ahead)
    assert path.name.endswith(f"-{name}.so")
    variant = next(variant for variant in X86_VARIANTS if variant.name == name)
    assert set(variant.flags) <= set(path.read_text().split())
    assert not cache.exists()


def test_a_library_of_other_sources_is_not_taken(
    ahead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: AVX512)
    monkeypatch.setattr(build, "_sources_key", lambda: "newer")
    with pytest.raises(NativeUnavailableError, match="compiler"):
        build_library(ahead, ahead)


def test_with_a_compiler_libraries_compiled_ahead_are_not_used(
    ahead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(WRITE))
    assert build_library(ahead, ahead).parent == ahead / "kernels"


COUNT = f"'-c' in sys.argv[1:] or open('{{count}}', 'a').write('x')\n{WRITE}"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files of its own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def a_full_disk(handle: int, offset: int, length: int) -> None:
    if "/held/" in os.readlink(f"/proc/self/fd/{handle}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("problem", ["Not a directory", "No space left on device"])
def test_where_the_cache_cannot_be_written_a_private_folder_is_used_and_warned_of(
    temporary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    problem: str,
) -> None:
    use(monkeypatch, python(COUNT.format(count=tmp_path / "count")))
    cache = tmp_path / "held"
    if problem == "Not a directory":
        cache.touch()  # even root cannot make a folder below a file
    else:
        monkeypatch.setattr(os, "posix_fallocate", a_full_disk)
    first, again = build_library(cache), build_library(cache)
    assert first == again == temporary / f"aerie-kernels-{os.getuid()}" / first.name
    assert first.parent.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "count").read_text() == "x", "compiled once"
    said = f"files.dir cannot be used ({cache / 'kernels'}: {problem})"
    assert caplog.text.count(said) == 1


def test_a_cache_that_is_only_read_serves_what_it_holds(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, python(WRITE))
    held = build_library(tmp_path)
    monkeypatch.setattr(build, "_why_unusable", lambda folder: "read-only")
    assert build_library(tmp_path) == held


@pytest.mark.parametrize("trap", ["link", "open", "full"])
def test_a_folder_that_others_may_have_filled_is_not_trusted(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    use(monkeypatch, python(WRITE))
    (tmp_path / "cache").touch()
    folder = temporary / f"aerie-kernels-{os.getuid()}"
    if trap == "link":
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs")
    elif trap == "open":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(build, "_why_unusable", lambda folder: f"{folder}: full")
    with pytest.raises(NativeUnavailableError, match=str(folder)):
        build_library(tmp_path / "cache")


@pytest.mark.parametrize(
    ("on_path", "wheel", "expected"),
    [
        ({"c++", "g++"}, True, ("/bin/c++",)),
        ({"clang++"}, True, ("/bin/clang++",)),
        (set(), True, (sys.executable, "-m", "ziglang", "c++")),
        (set(), False, None),
    ],
    ids=["first", "last", "wheel", "none"],
)
def test_compilers_are_looked_for_on_the_path_then_as_a_wheel(
    monkeypatch: pytest.MonkeyPatch, on_path: set[str], wheel: bool, expected: Command | None
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda n: f"/bin/{n}" if n in on_path else None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: object() if wheel else None)
    assert find_compiler.__wrapped__() == expected


def test_the_command_prints_where_the_library_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, python(WRITE))
    build.main(["--cache-dir", str(tmp_path)])
    assert Path(capsys.readouterr().out.strip()) == build_library(tmp_path)


def test_the_command_compiles_ahead_for_every_cpu(
    ahead: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[Variant] = []
    monkeypatch.setattr(build, "prebuild", lambda v: compiled.append(v) or ahead / v.name)
    build.main(["--prebuild"])
    assert tuple(compiled) == X86_VARIANTS
    assert capsys.readouterr().out.split() == [str(ahead / v.name) for v in X86_VARIANTS]


@pytest.mark.parametrize("arguments", [[], ["--prebuild", "--cache-dir", "x"]], ids=str)
def test_the_command_wants_one_place(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert "--cache-dir" in capsys.readouterr().err


def test_the_command_fails_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    monkeypatch.setattr(build, "variants", lambda: ())
    with pytest.raises(SystemExit, match="native kernels: no C"):
        build.main(["--cache-dir", str(tmp_path)])
