from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autoprune.artifact import architecture_of
from autoprune.cli.study_file import built_in_studies, find_study, load_study
from autoprune.cli.study_flags import find_factory, study_of_flags
from autoprune.data.weights import load_weights_, read_weights
from autoprune.errors import UsageError

STUDY = "from autoprune import Study\nimport torch\n"
VALUE = "mine = Study(name='mine', model=torch.nn.Linear(2, 2), data=lambda: None)\n"


@pytest.fixture(autouse=True)
def _forget_studies() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in ("some_study", "own_net", "a_neighbour", "digits", "models"):
        sys.modules.pop(name, None)


def write(folder: Path, text: str, name: str = "some_study.py") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_the_built_in_studies_are_those_of_the_folder() -> None:
    assert {"digits", "resnet20_cifar10", "resnet8_fashionmnist"} <= set(built_in_studies())
    assert "models" not in built_in_studies()


def test_a_built_in_study_loads_by_name() -> None:
    assert load_study("digits").name == "digits"


def test_a_misspelt_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="'digit'") as caught:
        find_study("digit")
    assert "did you mean 'digits'" in caught.value.hint


def test_a_misspelt_path_suggests_the_nearest(tmp_path: Path) -> None:
    given = write(tmp_path, VALUE)
    with pytest.raises(UsageError) as caught:
        find_study(given.replace("some", "sone"))
    assert given in caught.value.hint


@pytest.mark.parametrize("text", [VALUE, "def study():\n    return " + VALUE.partition("= ")[2]])
def test_a_value_and_a_function_both_make_a_study(text: str, tmp_path: Path) -> None:
    assert load_study(write(tmp_path, STUDY + text)).name == "mine"


def test_a_module_beside_the_study_is_found(tmp_path: Path) -> None:
    write(tmp_path, "NAME = 'neighbour'\n", "a_neighbour.py")
    text = STUDY + "import a_neighbour\n" + VALUE.replace("'mine'", "a_neighbour.NAME")
    assert load_study(write(tmp_path, text)).name == "neighbour"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no studies"),
        (STUDY + VALUE + VALUE.replace("mine", "other"), "defines 2 studies"),
        ("x = (\n", "SyntaxError"),
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("1 / 0\n", "some_study.py:1: ZeroDivisionError"),
        ("def study():\n    return 3\n", "returned int"),
    ],
)
def test_what_is_wrong_with_a_study_is_said(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_study(write(tmp_path, text))


def test_a_study_may_not_shadow_a_loaded_module(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already loaded"):
        load_study(write(tmp_path, STUDY + VALUE, "json.py"))


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("torchvision:resnet81", "did you mean 'resnet"),
        ("timm:resnet18", "FILE.py:"),
        ("nowhere.py:Net", "FILE.py:"),
        ("torchvison:resnet18", "did you mean 'torchvision'"),
    ],
)
def test_an_unknown_network_is_refused_with_a_way_on(model: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_factory(model)
    assert hint in caught.value.hint


def test_a_network_of_ones_own_gets_its_classes_and_weights(tmp_path: Path) -> None:
    text = (
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    study = study_of_flags(
        write(tmp_path, text, "own_net.py") + ":net", str(tmp_path / "w.safetensors"), "digits"
    )
    assert study.name == "net-digits"
    assert not isinstance(study.model, nn.Module)
    assert torch.equal(study.model()[1].weight, network[1].weight)
    source = architecture_of(network, study.model)
    assert (source.factory, source.arguments) == ("own_net:net", {"num_classes": 10})


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_the_usual_wrappings_of_weights_are_understood(wrap: object, prefix: str, tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pt")  # type: ignore[operator]
    fresh = nn.Linear(3, 2)
    load_weights_(fresh, tmp_path / "w.pt")
    assert torch.equal(fresh.weight, network.weight)


def test_old_weights_without_batch_counters_fit(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    state = {n: v for n, v in network.state_dict().items() if "tracked" not in n}
    torch.save(state, tmp_path / "w.pt")
    load_weights_(nn.Sequential(nn.BatchNorm1d(3)), tmp_path / "w.pt")


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 5), "extra": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError) as caught:
        load_weights_(nn.Linear(3, 2), tmp_path / "w.pt")
    assert "1 missing, first bias; 1 unexpected, first extra; 1 mis-shaped, first weight is [2, 5]" in str(
        caught.value
    )


def test_a_pickled_module_and_noise_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("module.pt", "noise.pt", "noise.safetensors", "list.pt", "missing.pt"):
        with pytest.raises(UsageError):
            read_weights(tmp_path / name)
