from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elite import geometry
from elite.errors import ModelError
from tests.plan.helpers import model_config

PARAMETERS = {"phi2": 2_779_683_840, "qwen25_coder_1_5b": 1_543_714_304, "llama31_8b": 8_030_261_248, "smollm2_135m": 134_515_008}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_parameter_counts(name: str) -> None:
    shape = geometry.shape(model_config(name))
    assert shape.total_params == PARAMETERS[name]
    assert shape.head_dim * shape.num_attention_heads == shape.layer_linears[0].outputs
    assert shape.layer_params * shape.num_hidden_layers < shape.total_params
    assert shape.linear_params <= shape.layer_params * shape.num_hidden_layers


def test_linear_maps_are_named_as_in_the_layer() -> None:
    shape = geometry.shape(model_config("phi2"))
    assert [linear.name.rpartition(".")[2] for linear in shape.layer_linears] == ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    assert shape.layer_linears[-1].inputs == 10240


def test_phi2_rotates_two_fifths_of_a_head() -> None:
    config = geometry.hf_config(model_config("phi2"))
    assert config.rope_parameters["partial_rotary_factor"] == 0.4
    assert config.eos_token_id == 50256


def test_a_folder_wins_over_the_geometry(tmp_path: Path) -> None:
    geometry.hf_config(replace(model_config("smollm2_135m"), num_hidden_layers=3)).save_pretrained(tmp_path)
    shape = geometry.shape(replace(model_config("phi2"), path=str(tmp_path)))
    assert (shape.model_type, shape.num_hidden_layers) == ("llama", 3)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "nonesuch"}, "'nonesuch' is unknown"),
        ({"hidden_size": 0}, "model.hidden_size=0: must be positive"),
        ({"num_attention_heads": 7}, "model.hidden_size=576 is not a multiple of model.num_attention_heads=7"),
        ({"num_key_value_heads": 2}, "model.num_attention_heads=9 is not a multiple of model.num_key_value_heads=2"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "gpt2"}, "gpt2"),
    ],
)
def test_impossible_models_say_why(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        geometry.shape(replace(model_config("smollm2_135m"), **changes))
    assert caught.value.remedy
    assert len(str(caught.value).splitlines()) <= 3


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        geometry.hf_config_from(tmp_path)
