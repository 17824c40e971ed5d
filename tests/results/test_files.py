"""Files of fits that are cut, changed, made up or of an older version; and saves that the system
stops.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import varmeta as vm
from tests.cases import known, linear_model, ragged_tasks
from tests.kill_saves import flip, strike
from tests.results.test_storage import assert_same
from varmeta.files import write as _write
from varmeta.files.container import DamagedError, packed, unpacked
from varmeta.results.old_format import _settings

PRIOR = vm.GaussianPrior(3.0)


def saved(path: Path) -> vm.Fit:
    fit = known(linear_model(PRIOR), ragged_tasks(3), vm.Joint())
    fit.save(path)
    return fit


# -- what is written is what is read ---------------------------------------------------------------


def test_plain_values_and_tensors_come_back() -> None:
    kinds = (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.uint8,
    )
    content = {
        "tensors": [torch.arange(6).reshape(2, 3).to(kind) for kind in kinds]
        + [torch.tensor(1.5), torch.zeros(3, 0)],
        "plain": (None, True, -3, 0.1, 1e300, float("inf"), "text\n\u00e9", [], (), {}),
        0: {"nested": ({"deep": [torch.ones(2)[::1]]},)},
        "strided": torch.arange(12.0).reshape(3, 4).T[::2],
    }
    assert_same(
        unpacked(b"".join(packed(content))), {**content, "strided": content["strided"].contiguous()}
    )


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"\['a'\]\[0\] is a function, which is neither a tensor nor a plain value"
    ):
        packed({"a": [saved]})


def test_a_view_takes_its_own_numbers_only() -> None:
    assert sum(map(len, packed({"a": torch.zeros(10**6)[:2]}))) < 300


# -- changed, cut, made up -------------------------------------------------------------------------


def test_every_flipped_bit_is_refused() -> None:
    assert flip(200, seed=1) == {"refused": 200}


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    fit = saved(tmp_path / "fit.pt")
    data = (tmp_path / "fit.pt").read_bytes()
    for length in [0, 1, 13, 14, 50, 96, 97, 98, 1000, len(data) - 1]:
        (tmp_path / "fit.pt").write_bytes(data[:length])
        with pytest.raises(ValueError, match="fit.pt' is not a varmeta fit"):
            vm.load(tmp_path / "fit.pt", fit.model)
    (tmp_path / "fit.pt").write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="its checksum does not fit: it was changed or cut short"):
        vm.load(tmp_path / "fit.pt", fit.model)


def signed(words: bytes, numbers: bytes = b"") -> bytes:
    """A made-up file with a checksum that fits."""
    import hashlib

    length = b"%016d\n" % len(words)
    digest = hashlib.sha256(length + words + numbers).hexdigest().encode()
    return b"varmeta fit 4\n" + digest + b"\n" + length + words + numbers


@pytest.mark.parametrize(
    "words",
    [
        b"", b"{", b"null", b"[]", b"3", b'{"dict": []}', b'{"dict": [[]]}',
        b'{"dict": [[{"dict": []}, 1]]}', b'{"dict": 3}', b'{"code": "os"}', b'{"tensor": []}',
        b'{"tensor": ["float64", [-1]]}', b"[" * 10**6, b'{"tensor": ["float64", [1000000000000]]}',
        b'{"tensor": ["float64", [0, 99999999999999999999]]}',
        b'{"tensor": ["object", [1]]}', b'{"tuple": {"dict": []}}', b"9" * 10**5, b"\xff",
    ],
)  # fmt: skip
def test_made_up_words_end_in_one_kind_of_error(words: bytes, tmp_path: Path) -> None:
    (tmp_path / "fit.pt").write_bytes(signed(words))
    with pytest.raises(ValueError, match="fit.pt' is (not a varmeta fit|damaged)"):
        vm.load(tmp_path / "fit.pt", linear_model(PRIOR))


def test_a_small_file_gets_little_memory(tmp_path: Path) -> None:
    (tmp_path / "fit.pt").write_bytes(
        signed(json.dumps({"tensor": ["float64", [600_000_000]]}).encode(), bytes(6500))
    )
    tracemalloc.start()
    with pytest.raises(ValueError, match="is not a varmeta fit"):
        vm.load(tmp_path / "fit.pt", linear_model(PRIOR))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


ODD = [
    None,
    True,
    -1,
    3,
    0.5,
    "text",
    [],
    {},
    (),
    torch.zeros(0),
    torch.zeros(2, 2, dtype=torch.int64),
    [[1]],
    {"a": 1},
]


def test_whatever_stands_in_a_field_is_read_or_refused(tmp_path: Path) -> None:
    """Every field in turn is another value, and every part of a field: a fit, or a ValueError with
    the path.
    """
    fit = known(linear_model(PRIOR), ragged_tasks(3), vm.Implicit("normal", warm_start=True))
    fit.save(tmp_path / "fit.pt")
    good = unpacked((tmp_path / "fit.pt").read_bytes())
    tried = 0
    for name in good:
        for odd in ODD:
            made = [{**good, name: odd}]
            if isinstance(good[name], dict):
                made += [{**good, name: {**good[name], key: odd}} for key in good[name]]
                made += [
                    {**good, name: {k: v for k, v in good[name].items() if k != key}}
                    for key in good[name]
                ]
            if name in ("strategy", "weights", "model", "constants") and not isinstance(
                odd, torch.Tensor
            ):
                words = json.loads(good[name])
                made += [{**good, name: json.dumps({**words, key: odd})} for key in words]
                made += [{**good, name: json.dumps(odd)}, {**good, name: "[" * 10**5}]
            for content in made:
                tried += 1
                (tmp_path / "fit.pt").write_bytes(b"".join(packed(content)))
                try:
                    found = vm.load(tmp_path / "fit.pt", fit.model)
                except ValueError as error:
                    assert "fit.pt'" in str(error) or "pass load(path" in str(error), error  # noqa: PT017
                else:
                    str(found), found.history
                    with contextlib.suppress(
                        ValueError
                    ):  # an option out of range, which the constructor lets pass too
                        found.posterior()
    assert tried > 500


# -- the format before -----------------------------------------------------------------------------


def write_old(fit: vm.Fit, path: Path, **changes: Any) -> None:
    """As the version before wrote it: torch's zip of a dict, without a checksum."""
    fit.save(path)
    content = unpacked(path.read_bytes())
    for name in ("version", "model", "constants", "numbers"):
        del content[name]
    torch.save(
        content | {"format": "varmeta fit 3", "likelihood": _settings(fit.model)} | changes, path
    )


def test_the_format_before_still_loads(tmp_path: Path) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(3), vm.Joint())
    write_old(fit, tmp_path / "fit.pt")
    with pytest.warns(
        RuntimeWarning, match="fit.pt' has the format of an older version .* which has no checksum"
    ):
        back = vm.load(tmp_path / "fit.pt", fit.model)
    assert_same(back.eta, fit.eta)
    assert_same(back.run.history, fit.run.history)
    with pytest.raises(ValueError, match="is a fit with the likelihood Gaussian"):
        vm.load(
            tmp_path / "fit.pt",
            vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.StudentT(), PRIOR),
        )
    with pytest.raises(ValueError, match="is a fit under another prior"):
        vm.load(tmp_path / "fit.pt", linear_model(vm.GaussianPrior(4.0)))


def bomb() -> Any:
    value: Any = [0]
    for _ in range(40):
        value = [value, value]
    return value


def nested() -> Any:
    value: Any = []
    for _ in range(150):  # what torch.save can still write
        value = [value]
    return value


LONG = torch.zeros(1, 1, dtype=torch.float64).expand(600_000_000, 1)  # one number on disk


@pytest.mark.parametrize(
    "changes",
    [
        {"history": bomb()}, {"history": nested()},
        {"tasks": [("a", (LONG, torch.zeros(1)), None)]},
        {"eta": {}}, {"eta": {"weight": 3}},
        {"counters": {"step": 1}}, {"counters": {"step": 1, "lr_scale": 1.0, "x": 1}},
        {"strategy": "[" * 10**5}, {"strategy": "{}"}, {"strategy": '{"kind": "Joint", "no": 1}'},
        {"strategy": '{"kind": "Adam"}'},
        {"weights": "{"}, {"likelihood": "Gaussian {"},
        {"hyper": {"points": {}}}, {"phi": {"loc": torch.zeros(1, 1)}},
    ],
)  # fmt: skip
def test_made_up_files_of_the_format_before(changes: dict[str, Any], tmp_path: Path) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(3), vm.Joint())
    write_old(fit, tmp_path / "fit.pt", **changes)
    with pytest.raises(ValueError, match="fit.pt' is (not a varmeta fit|damaged)"):
        vm.load(tmp_path / "fit.pt", fit.model)


# -- what stops a save -----------------------------------------------------------------------------


def other(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "fit.pt")


@pytest.mark.parametrize("unnamed", [True, False], ids=["without a name", "beside"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["full", "ctrl-c"],
)
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_save_that_is_stopped_leaves_the_old_file(
    at: str, error: BaseException, unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = saved(tmp_path / "fit.pt")
    before = (tmp_path / "fit.pt").read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(_write.os, at, stop)
    if not unnamed:
        monkeypatch.setattr(_write, "UNNAMED", None)
    with pytest.raises(type(error)) as caught:
        fit.save(tmp_path / "fit.pt")
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert str(tmp_path / "fit.pt") in str(
            caught.value
        ) and "what stood there before still does" in str(caught.value)
        assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert (tmp_path / "fit.pt").read_bytes() == before and other(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_device_is_no_file() -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    with pytest.raises(ValueError, match="'/dev/full' is no ordinary file"):
        fit.save("/dev/full")


def test_a_file_that_may_not_be_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = saved(tmp_path / "fit.pt")
    monkeypatch.setattr(
        _write.os, "access", lambda *_: False
    )  # the tests may run as root, who may write anything
    with pytest.raises(PermissionError, match="may not be written.*fit.pt"):
        fit.save(tmp_path / "fit.pt")


def test_mode_and_link_stay(tmp_path: Path) -> None:
    fit = saved(tmp_path / "fit.pt")
    (tmp_path / "fit.pt").chmod(0o640)
    (tmp_path / "link.pt").symlink_to(tmp_path / "fit.pt")
    fit.save(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and (
        tmp_path / "fit.pt"
    ).stat().st_mode & 0o777 == 0o640


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"there is no such file: Fit.save writes one: '.*missing.pt'"
    ):
        vm.load(tmp_path / "missing.pt", linear_model(PRIOR))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_save_leaves_a_whole_file(how: signal.Signals) -> None:
    """Five of the two hundred that `python -m tests.kill_saves` runs."""
    found = strike(5, how, seed=3)
    left = found.pop("left beside")
    assert found == {"whole": 5}
    assert left == 0 or how == signal.SIGKILL  # which leaves no time to clean up


def test_files_that_another_writer_makes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("old")

    def write(fail: bool) -> Callable[[Path], None]:
        def to(path: Path) -> None:
            path.write_text("half")
            if fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        return to

    for fail in (True, False):
        try:
            with _write.replacing(tmp_path / "table.csv") as beside:
                write(fail)(beside)
        except OSError as error:
            said = str(error)
            assert "No space left" in said and "table.csv'" in said and ".part" not in said
            assert (tmp_path / "table.csv").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert (tmp_path / "table.csv").read_text() == "half"


def test_what_is_damaged_is_a_value_error() -> None:
    assert issubclass(DamagedError, ValueError)
