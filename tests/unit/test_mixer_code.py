"""What an export ships of a user's own mixers: their files with relative imports, and nothing that it cannot hold."""

import json
import sys
import textwrap

import documented_mixers
import pytest
import tiny
import torch
from tolerances import PADDING, SPLIT, relative_error

from radlads.checkpoint.hf_export import check_exportable, export
from radlads.checkpoint.mixer_code import has_code
from radlads.checkpoint.model_folder import load_model, open_model, save_model
from radlads.checkpoint.weight_files import convert_to_safetensors
from radlads.cli import main
from radlads.model import registry
from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

CHANNEL = """
    import torch
    from radlads.model.swiglu import SwiGLU  # ours, with a twist

    class CMix_twist(SwiGLU):
        def forward(self, x):
            return super().forward(x) * 2
"""
EMPTY = "class TMix_theirs(TimeMixer):\n    def __init__(self, config, layer_idx):\n        super().__init__()\n"
OWN = {"time_mixers": ["mean", "leaky", "rad_rwkv7"], "channel_mixers": ["swiglu", "twist", "swiglu"]}
OWN |= {"mixer_settings": {"leaky": {"leak": 0.25}}}


@pytest.fixture
def mixers(tmp_path):
    """The folder of the page's mixers and a channel mixer, as --mixer-path finds them; forgotten afterwards."""
    folder = documented_mixers.write_mixers(tmp_path / "mixers")
    write(folder, CHANNEL, "cmix/cmix_twist.py")
    with documented_mixers.known(folder):
        yield folder


def write(folder, source, name="tmix/tmix_theirs.py"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(textwrap.dedent(source))
    return folder / name


def config(**changes):
    return RadladsConfig(**tiny.SIZES | changes)


@pytest.fixture
def model(mixers):
    torch.manual_seed(0)
    model = RadladsForCausalLM(config(**OWN)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def exported(model, teacher, tmp_path):
    export(model, teacher, tmp_path / "out")
    return tmp_path / "out"


# What is written


def test_files_are_shipped_with_the_imports_of_siblings_and_else_unchanged(exported, mixers):
    for name in ("tmix/tmix_leaky.py", "tmix/tmix_mean.py", "cmix/cmix_twist.py"):
        source = (mixers / name).read_text()
        assert (exported / name.partition("/")[2]).read_text() == source.replace("from radlads.model.", "from .")
        assert source.count("from radlads.model.") > 0
    assert (exported / "own_mixers.py").read_text() == textwrap.dedent('''\
        """Mixers that are not part of radlads, whose files are beside this one: written by `radlads export`."""


        def time_mixers() -> dict[str, type]:
            """Time mixers by name."""
            from .tmix_leaky import TMix_leaky
            from .tmix_mean import TMix_mean

            return {"leaky": TMix_leaky, "mean": TMix_mean}


        def channel_mixers() -> dict[str, type]:
            """Channel mixers by name."""
            from .cmix_twist import CMix_twist

            return {"twist": CMix_twist}
        ''')


def test_only_imports_are_rewritten_wherever_they_stand(mixers, teacher, tmp_path):
    source = textwrap.dedent('''\
        """éé: say `from radlads.model.layers import RMSNorm`."""
        from typing import TYPE_CHECKING
        from radlads.model.time_mixer import (
            StateTensor,
            TimeMixer,
        )
        if TYPE_CHECKING:
            from  radlads.model.configuration  import RadladsConfig
        class TMix_theirs(TimeMixer):
            def __init__(self, config, layer_idx):
                super().__init__()
            def forward(self, x, state, v_first, shared):
                é = 1; from radlads.model.layers import RMSNorm  # from radlads.model.layers import
                return x, state, v_first
        ''').replace("\n", "\r\n")
    (mixers / "tmix" / "tmix_theirs.py").write_bytes(source.encode())
    export(RadladsForCausalLM(config(time_mixers=["theirs"] * 3)), teacher, tmp_path / "out")
    expected = source.replace("from radlads.model.time_mixer import (", "from .time_mixer import (")
    expected = expected.replace("from  radlads.model.configuration  import", "from .configuration import")
    expected = expected.replace("1; from radlads.model.layers import", "1; from .layers import")
    assert (tmp_path / "out" / "tmix_theirs.py").read_bytes() == expected.encode()


def test_our_own_models_ship_an_empty_table(teacher, tmp_path):
    export(tiny.moved_student(teacher, tmp_path), teacher, tmp_path / "out")
    assert (tmp_path / "out" / "own_mixers.py").read_bytes() == (
        documented_mixers.PAGE.parents[1] / "src" / "radlads" / "model" / "own_mixers.py"
    ).read_bytes()
    assert not list((tmp_path / "out").glob("?mix_*"))


def test_converted_weights_bring_the_code_along_unrun(model, mixers, tmp_path):
    (tmp_path / "run").mkdir()
    save_model(model, tmp_path / "run")
    tiny.save_tokenizer(tmp_path / "run")
    documented_mixers.forget()
    convert_to_safetensors(tmp_path / "run", tmp_path / "out")
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "tmix_leaky.py").is_file()
    assert not [name for name in sys.modules if name.startswith(("tmix", "cmix"))]
    (mixers / "tmix" / "tmix_mean.py").unlink()
    convert_to_safetensors(tmp_path / "run", tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not (tmp_path / "again" / "modeling.py").exists()


# What is refused


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import radlads.model.layers", "radlads.model.layers"),
        ("import torch, radlads", "radlads"),
        ("from radlads import model", "radlads"),
        ("from radlads.model import layers", "radlads.model"),
        ("from radlads.train.optimizers.optim import build_optimizers", "radlads.train.optimizers.optim"),
        ("from radlads.model.layers.more import x", "radlads.model.layers.more"),
        ("from radlads.model.nosuch import x", "radlads.model.nosuch"),
        ("from radlads.model.layers \\\n    import RMSNorm", "radlads.model.layers"),
        ("from .layers import RMSNorm", ".layers"),
        ("from . import layers", "."),
        ("from tmix.tmix_mean import TMix_mean", "tmix.tmix_mean"),
        ("import tmix_mean", "tmix_mean"),
        ("import cmix.cmix_twist", "cmix.cmix_twist"),
        ("def f():\n    import radlads.cli", "radlads.cli"),
    ],
)
def test_an_import_that_no_export_holds_is_refused(mixers, line, what):
    # In a function, so that the file can be imported whatever it is
    late = "def late():\n" + textwrap.indent(line, "    ") + "\n"
    file = write(mixers, f"from radlads.model.time_mixer import TimeMixer\n{late}{EMPTY}")
    own = config(time_mixers=["theirs"] * 3)
    number = 4 if line.startswith("def") else 3
    with pytest.raises(ValueError) as error:
        check_exportable(own)
    assert str(error.value) == (
        f"{file}, line {number} imports {what}, which no export holds: write `from radlads.model.X import Y`, and put "
        "what else it needs into the file"
    )
    assert not has_code(own)


def test_packages_of_others_may_be_imported(mixers):
    write(mixers, f"import numpy.linalg\nfrom radlads.model.time_mixer import TimeMixer\n{EMPTY}")
    check_exportable(config(time_mixers=["theirs"] * 3))


@pytest.mark.parametrize(
    ("line", "tensor"),
    [
        ("self.register_buffer('table', torch.ones(2), persistent=False)", "table"),
        ("self.register_buffer('table', torch.ones(2))", "table"),
        ("self.norm = torch.nn.BatchNorm1d(2)", "running_mean"),
        ("self.table = torch.ones(2)", "table"),
    ],
)
@pytest.mark.parametrize("kind", ["tmix", "cmix"])
def test_what_no_file_of_weights_holds_is_refused(mixers, kind, line, tensor):
    name = f"{kind.replace('t', 'T').replace('c', 'C').replace('m', 'M')}_theirs"
    source = f"import torch\nclass {name}(torch.nn.Module):\n  def __init__(self, config, layer_idx):\n"
    write(mixers, f"{source}    super().__init__()\n    {line}\n", f"{kind}/{kind}_theirs.py")
    names = {"tmix": "time_mixers", "cmix": "channel_mixers"}[kind]
    with pytest.raises(ValueError, match=f"the mixer 'theirs' cannot be exported: {tensor} is no parameter"):
        check_exportable(config(**{names: ["theirs"] * 3}))


def test_a_mixer_that_transformers_cannot_build_is_refused(mixers):
    source = "import torch\nclass TMix_theirs(torch.nn.Module):\n  def __init__(self, config, layer_idx):\n"
    write(mixers, f"{source}    super().__init__()\n    self.scale = torch.ones(1).item()\n")
    with pytest.raises(ValueError, match=r"'theirs' cannot be exported: transformers builds it on the meta device"):
        check_exportable(config(time_mixers=["theirs"] * 3))


@pytest.mark.parametrize(
    ("line", "changed", "said"),
    [
        ("import torch\n", "import torch\nimport radlads.cli\n", "imports radlads.cli, which no export holds"),
        ("real = ", "x.sum().item()\n        real = ", "cannot be found by running it on the meta device"),
    ],
    ids=["export", "state"],
)
def test_a_demo_says_so_before_it_trains(mixers, teacher, corpus_folder, tmp_path, capsys, line, changed, said):
    source = documented_mixers.examples()["tmix/tmix_mean.py"].replace("mean", "theirs")
    assert line in source
    write(mixers, source.replace(line, changed, 1))
    data = ["--data", corpus_folder / "train", "--heldout-data", corpus_folder / "heldout"]
    command = ["demo", "--teacher", teacher, "--mixer", "theirs", *data, "--out", tmp_path / "out"]
    command += ["--mixer-path", mixers, "--set", "train.my_exit_tokens=256", "--set", "model.ctx_len=16"]
    command += ["--set", "train.heldout_tokens=160", "--set", "train.micro_bsz=4"]
    assert main(list(map(str, command))) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("1-align*"))


# An export that is opened


@pytest.fixture
def elsewhere(exported, monkeypatch):
    """The export where its mixers' own folder is not known."""
    documented_mixers.forget()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("mixers")])
    registry._mixer_paths.clear()
    return exported


GENERATE = ["--prompt", "ab", "--max-tokens", "2", "--device", "cpu"]


@pytest.mark.parametrize("at_home", [False, True])
def test_an_exports_own_code_is_not_run_because_its_config_json_names_it(elsewhere, capsys, monkeypatch, at_home):
    if at_home:
        monkeypatch.chdir(elsewhere)
        monkeypatch.setattr(sys, "path", ["", str(elsewhere), *sys.path])
    assert main(["generate", str(elsewhere), *GENERATE]) == 2
    assert capsys.readouterr().err == (
        "radlads: the model's folder has the code of its mixer 'leaky', but that is not run because config.json names "
        f"it: if you trust {elsewhere}/tmix_leaky.py, give --mixer-path {elsewhere}\n"
    )
    assert main(["export", str(elsewhere), str(elsewhere.parent / "again")]) == 2
    assert f"give --mixer-path {elsewhere}" in capsys.readouterr().err
    assert not [name for name in sys.modules if "mix_leaky" in name]


def test_it_is_run_where_the_user_names_the_export(elsewhere, model):
    assert main(["generate", str(elsewhere), *GENERATE, "--mixer-path", str(elsewhere)]) == 0
    found = load_model(elsewhere)
    assert type(found.model.layers[1].self_attn).__module__ == "radlads.model.tmix_leaky"
    ids = torch.arange(1, 20)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_its_mixers_are_listed_by_their_files_then(elsewhere, capsys):
    assert main(["mixers", "--mixer-path", str(elsewhere)]) == 0
    assert f"{elsewhere}/tmix_leaky.py" in capsys.readouterr().out
    assert not [name for name in sys.modules if "mix_leaky" in name]


def test_an_export_that_is_trusted_is_exported_again_with_the_same_code(elsewhere, teacher, tmp_path):
    registry.add_mixer_path(elsewhere)
    export(load_model(elsewhere), teacher, tmp_path / "again")
    for name in ("tmix_leaky.py", "cmix_twist.py", "own_mixers.py"):
        assert (tmp_path / "again" / name).read_bytes() == (elsewhere / name).read_bytes()


def test_reading_a_configuration_runs_no_mixer(elsewhere, mixers):
    registry.add_mixer_path(elsewhere)
    registry.add_mixer_path(mixers)
    found = open_model(elsewhere).config
    assert RadladsConfig.from_pretrained(elsewhere).mixer_settings == {"leaky": {"leak": 0.25}}
    assert found.layer_types == ["linear_attention"] * 3
    assert not [name for name in sys.modules if name.partition(".")[2].startswith(("tmix_", "cmix_", "model.tmix_"))]


# The laws that the page states, of its own mixers


@pytest.mark.parametrize("mixer", ["mean", "leaky"])
@pytest.mark.parametrize("cut", [1, 7, 12])
def test_a_cut_text_is_the_whole_text(mixers, mixer, cut):
    model, ids = own_model(mixer), torch.randint(1, 256, (2, 13))
    cache = RadladsCache(model.config)
    with torch.no_grad():
        parts = [model(ids[:, :cut], past_key_values=cache).logits, model(ids[:, cut:], past_key_values=cache).logits]
        assert relative_error(torch.cat(parts, dim=1), model(ids).logits) < SPLIT


@pytest.mark.parametrize("mixer", ["mean", "leaky"])
def test_padding_leaves_the_state_as_it_was(mixers, mixer):
    model, ids = own_model(mixer), torch.randint(1, 256, (2, 13))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 13])
    with torch.no_grad():
        padded, plain = model(ids, attention_mask=mask).logits[:1, 3:], model(ids[:1, 3:]).logits
    assert relative_error(padded, plain) < PADDING


@pytest.mark.parametrize("mixer", ["mean", "leaky"])
def test_the_state_is_what_state_tensors_says(mixers, mixer):
    model = own_model(mixer)
    cache = RadladsCache(model.config)
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64), past_key_values=cache)
    for layer in range(3):
        said = model.config.mixer_class(layer).state_tensors(model.config, layer)
        held = cache.layers[layer].state._asdict()
        assert {name: (x.shape, x.dtype) for name, x in said.items()} == {
            name: (tuple(x.shape[1:]), x.dtype) for name, x in held.items()
        }


def own_model(mixer):
    """A model of one of the page's mixers, every parameter moved."""
    torch.manual_seed(0)
    model = RadladsForCausalLM(config(time_mixers=[mixer] * 3)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


# Initial values


def test_a_mixer_begins_as_its_constructor_leaves_it(mixers):
    write(
        mixers,
        """
        from torch import nn
        from radlads.model.time_mixer import TimeMixer

        class TMix_theirs(TimeMixer):
            def __init__(self, config, layer_idx):
                super().__init__()
                self.extra = nn.Linear(3, 3)
                nn.init.constant_(self.extra.weight, 5)
        """,
    )
    model = RadladsForCausalLM(config(time_mixers=["theirs"] * 3))
    assert all((block.self_attn.extra.weight == 5).all() for block in model.model.layers)


def test_what_a_subclass_adds_begins_as_its_constructor_leaves_it(mixers):
    write(
        mixers,
        """
        from torch import nn
        from radlads.model.rad_rwkv7 import RadRwkv7

        class TMix_theirs(RadRwkv7):
            def __init__(self, config, layer_idx):
                super().__init__(config, layer_idx)
                self.extra = nn.Linear(3, 3)
                nn.init.constant_(self.extra.weight, 5)
        """,
    )
    model = RadladsForCausalLM(config(time_mixers=["theirs"] * 3))  # transformers fills every nn.Linear anew
    assert all((block.self_attn.extra.weight == 5).all() for block in model.model.layers)
