"""The compared models: what distinguishes them, that nothing else does, and that they are equally large."""

from __future__ import annotations

from pathlib import Path

import pytest

from defocus_mllm import DefocusVisionConfig
from training.argument_parsing import parse_arguments, recipe_values
from training.arguments import EvidenceArguments, JsonDict, Stage0VisionArguments
from training.evidence_models import STUDIES, check_equal_sizes, chosen_models, count_parameters, model_fields

RECIPE = str(Path(__file__).parents[2] / "training" / "recipes" / "cifar10.yaml")
WORDS = ["--config", RECIPE, "--output_dir", "o", "--train", "t", "--test", "e"]


def sizes(*words: str) -> EvidenceArguments:
    return parse_arguments(EvidenceArguments, "evidence", [*WORDS, *words])


def configs(study: str) -> dict[str, DefocusVisionConfig]:
    shared = recipe_values(RECIPE, "stage0_vision")["vision_config"]
    arguments = sizes("--study", study)
    return {
        model.name: DefocusVisionConfig(**model_fields(model, shared, arguments)) for model in chosen_models(arguments)
    }


def test_main_table_is_the_eight_models_of_the_paper() -> None:
    found = {
        name: (config.mixer, config.causal, config.decay, config.rotary, config.aux_loss)
        for name, config in configs("main").items()
    }
    assert found == {
        "causal_vit": ("attention", True, "none", "none", "none"),
        "defocus_vit": ("attention", True, "learnable", "learnable", "pooled"),
        "noncausal_vit": ("attention", False, "none", "none", "none"),
        "noncausal_defocus_vit": ("attention", False, "learnable", "learnable", "pooled"),
        "causal_retnet": ("retention", True, "fixed", "fixed", "none"),
        "defocus_retnet": ("retention", True, "learnable", "learnable", "pooled"),
        "causal_mamba": ("mamba", True, "data_dependent", "none", "none"),
        "defocus_mamba": ("mamba", True, "data_dependent", "learnable", "pooled"),
    }


def test_filter_ablation_has_the_rows_of_table_5a() -> None:
    rows = [
        (config.mixer, config.decay, config.rotary, config.aux_loss) for config in configs("ablation_filter").values()
    ]
    filters = [("none", "none"), ("none", "fixed"), ("fixed", "none"), ("fixed", "fixed"), ("fixed", "learnable")]
    filters += [("learnable", "none"), ("learnable", "learnable"), ("data_dependent", "learnable")]
    assert rows == [("mamba", decay, rotary, "pooled") for decay, rotary in filters]


def test_drop_path_ablation_has_the_rows_of_table_5b() -> None:
    rates = [dict(model.arguments) for model in STUDIES["ablation_drop_path"].models]
    values = [(row.get("min_drop_path_rate"), row.get("drop_path_rate")) for row in rates]
    assert values == [(0.1, 0.1), (0.4, 0.4), (0.7, 0.7), (0.1, 0.7), (None, None)]  # the last: the recipe's


@pytest.mark.parametrize("study", STUDIES)
def test_models_of_a_study_have_different_names_and_configurations(study: str) -> None:
    models = STUDIES[study].models
    assert len({model.name for model in models}) == len({model.title for model in models}) == len(models)
    distinct = [(configs(study)[model.name].to_dict(), dict(model.arguments)) for model in models]
    assert all(one != other for number, one in enumerate(distinct) for other in distinct[:number])
    assert {name for pair in STUDIES[study].comparisons for name in pair} <= {model.name for model in models}


@pytest.mark.parametrize("study", STUDIES)
def test_recipe_gives_all_models_the_same_size(study: str) -> None:
    shared = recipe_values(RECIPE, "stage0_vision")["vision_config"]
    arguments = sizes("--study", study)
    counts = {}
    for model in chosen_models(arguments):
        fields = JsonDict(model_fields(model, shared, arguments))
        counts[model.name] = count_parameters(Stage0VisionArguments(output_dir="o", data="d", vision_config=fields), 10)
    if study == "main":
        check_equal_sizes(counts)  # within 2 %
    assert all(180_000 < count < 200_000 for count in counts.values())


def test_unequal_sizes_are_refused() -> None:
    check_equal_sizes({"a": 1000, "b": 1020})
    with pytest.raises(ValueError, match=r"a has 1,000 parameters, b 1,021.*section evidence"):
        check_equal_sizes({"a": 1000, "b": 1021})


def test_models_are_chosen_by_name() -> None:
    assert [model.name for model in chosen_models(sizes("--models", "defocus_vit", "causal_vit"))] == [
        "defocus_vit",
        "causal_vit",
    ]
    with pytest.raises(ValueError, match=r"'main' has no 'mamba'.*defocus_mamba"):
        chosen_models(sizes("--models", "mamba"))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seeds", "1", "1"], "twice"), (["--seeds", "-1"], "negative"), (["--processes", "-1"], "processes")],
)
def test_arguments_are_checked(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes(*words)
