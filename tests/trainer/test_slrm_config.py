# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
from trl import RewardConfig, TrlParser

from tapo_trl import SLRMConfig


def config(tmp_path, **kwargs) -> SLRMConfig:
    return SLRMConfig(str(tmp_path), bf16=False, report_to="none", **kwargs)


def test_defaults_are_the_papers(tmp_path):
    args = config(tmp_path)
    assert isinstance(args, RewardConfig)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1e-5, 0.01, 0.9, 0.999)
    args.fill_in()
    assert args.rho == math.log(4) and args.resolution == 512 and args.score_link == "exp"
    assert args.velocity_target == "reference" and args.timestep_sampling == "uniform" and args.shared_noise
    assert args.activation_checkpointing


def test_every_field_has_help_and_is_documented():
    own = set(SLRMConfig.__annotations__)
    for name in own:
        field = SLRMConfig.__dataclass_fields__[name]
        assert field.metadata["help"], name
        if name != "gradient_checkpointing":
            assert f"{name}`" in SLRMConfig.__doc__ or f"{name} (" in SLRMConfig.__doc__, name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score_link", "relu"),
        ("velocity_target", "parent"),
        ("timestep_sampling", "beta"),
        ("reward_model_type", "clip"),
        ("loss_type", "hinge"),
        ("num_task_tokens", -1),
        ("enhancement", "subtractive"),
        ("task_projection_rank", 0),
        ("resolution", -8),
        ("height", 0),
        ("width", -8),
        ("num_frames", 0),
        ("fps", 0),
        ("dimension_weights", {}),
        ("dimension_weights", {"visual_quality": 0.0}),
        ("max_sequence_length", 0),
        ("rho", -1.0),
        ("score_preservation_coef", -0.1),
        ("eta", 0.0),
        ("label_smoothing", 0.5),
        ("eval_sigmas", []),
        ("eval_sigmas", [0.5, 1.5]),
        ("eval_rules", ["paper"]),
        # Fields of language models
        ("chat_template_path", "template.jinja"),
        ("eos_token", "<eos>"),
        ("pad_token", "<pad>"),
        ("pad_to_multiple_of", 8),
        ("max_length", 77),
        ("dataset_num_proc", 2),
        ("trust_remote_code", True),
    ],
)
def test_bad_values_name_their_field(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"^`{field}`"):
        config(tmp_path, **{field: value})


@pytest.mark.parametrize(
    ("target", "rule"), [("ground_truth", "reference"), ("reference", "reference"), ("none", "none")]
)
def test_accuracy_is_measured_under_the_papers_rule_and_a_deployable_one(target, rule, tmp_path):
    assert config(tmp_path, velocity_target=target).eval_rules == ["ground_truth", rule]


RECORDED = {
    **{"rho": 0.5, "score_link": "softplus", "velocity_target": "none", "max_sequence_length": 64},
    **{"resolution": 256, "height": 256, "width": 256, "num_frames": None, "trained": True},
}


class TestFillIn:
    """What a training that goes on was like."""

    def test_fields_that_are_left_open_are_those_of_the_folder(self, tmp_path):
        args = config(tmp_path)
        args.fill_in(RECORDED)
        assert {name: getattr(args, name) for name in RECORDED.keys() - {"trained"}}.items() <= RECORDED.items()
        assert args.eval_rules == ["ground_truth", "none"], "by the target that is used"
        explicit = config(tmp_path, eval_rules=["reference"], rho=0.5, resolution=256, num_frames=None, width=256)
        explicit.fill_in(RECORDED)
        assert (explicit.eval_rules, explicit.rho, explicit.height) == (["reference"], 0.5, 256)

    def test_folders_of_another_aspect(self, tmp_path):
        recorded = RECORDED | {"resolution": 512, "height": 480, "width": 832, "num_frames": 33}
        for kwargs in ({}, {"height": 480, "width": 832}, {"num_frames": 33}):
            args = config(tmp_path, **kwargs)
            args.fill_in(recorded)
            assert (args.height, args.width, args.num_frames) == (480, 832, 33)
        old = config(tmp_path)
        old.fill_in(RECORDED | {"height": None, "width": None})
        assert (old.height, old.width) == (256, 256)

    @pytest.mark.parametrize(
        ("field", "value", "recorded"),
        [
            ("rho", 1.0, "`rho=0.5`"),
            ("score_link", "exp", "`score_link='softplus'`"),
            ("velocity_target", "reference", "`velocity_target='none'`"),
            ("max_sequence_length", 256, "`max_sequence_length=64`"),
            ("resolution", 512, "`height=256`"),
            ("height", 512, "`height=256`"),
            ("num_frames", 9, "`num_frames=None`"),
        ],
    )
    def test_what_contradicts_is_refused(self, tmp_path, field, value, recorded):
        with pytest.raises(ValueError, match=f"^`{field}={value!r}` is not what .*{recorded}: leave it unset"):
            config(tmp_path, **{field: value}).fill_in(RECORDED)

    def test_a_model_that_was_never_trained_contradicts_nothing(self, tmp_path):
        args = config(tmp_path, rho=1.0, resolution=64)
        args.fill_in(RECORDED | {"trained": False})
        assert (args.rho, args.score_link, args.resolution, args.max_sequence_length) == (1.0, "softplus", 64, None)

    def test_other_kinds_have_no_velocity(self, tmp_path):
        args = config(tmp_path, reward_model_type="lrm")
        args.fill_in({"resolution": 64, "height": None, "width": None, "max_sequence_length": 8, "trained": True})
        assert (args.rho, args.velocity_target, args.eval_rules, args.resolution) == (None, None, ["none"], 64)


@pytest.mark.parametrize(
    ("kind", "loss_type", "rules", "model_config"),
    [
        ("slrm", "bradley_terry", ["ground_truth", "reference"], {"num_task_tokens": 8, "task_projection_rank": None}),
        ("lrm", "bradley_terry", ["none"], {"layer": None, "guidance_scale": 7.5}),
        ("dina", "thurstone", ["none"], {"layers": None, "num_queries": 4}),
    ],
)
def test_kinds_of_reward_models(kind, loss_type, rules, model_config, tmp_path):
    args = config(tmp_path, reward_model_type=kind)
    assert (args.loss_type, args.eval_rules, args.model_config()) == (loss_type, rules, model_config)
    other = {"bradley_terry": "thurstone", "thurstone": "bradley_terry"}[loss_type]
    assert config(tmp_path, reward_model_type=kind, loss_type=other).loss_type == other


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("lrm", "num_task_tokens", 4),
        ("dina", "task_projection_rank", 2),
        ("lrm", "score_link", "softplus"),
        ("dina", "rho", 1.0),
        ("lrm", "velocity_target", "none"),
        ("dina", "detach_score", True),
        ("lrm", "enhancement", "additive"),
        ("lrm", "score_preservation_coef", 0.0),
        ("slrm", "lrm_layer", 18),
        ("dina", "lrm_guidance_scale", 1.0),
        ("slrm", "dina_layers", [4, 8, 12]),
        ("lrm", "dina_num_queries", 2),
        ("slrm", "spm_clip_model", "my-name/clip"),
        ("spm", "lrm_layer", 18),
        ("spm", "velocity_target", "none"),
    ],
)
def test_fields_of_another_kind(kind, field, value, tmp_path):
    with pytest.raises(
        ValueError, match=f"^`{field}` is for .*`reward_model_type='{kind}'`: leave it unset, or change"
    ):
        config(tmp_path, reward_model_type=kind, **{field: value})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reward_model_type": "lrm", "lrm_layer": 0}, "^`lrm_layer` must be at least 1"),
        ({"reward_model_type": "dina", "dina_num_queries": 0}, "^`dina_num_queries` must be at least 1"),
        ({"reward_model_type": "dina", "dina_layers": [4, 4]}, "^`dina_layers` must be .* in ascending order"),
        ({"reward_model_type": "dina", "eval_rules": ["reference"]}, "^`eval_rules=.* only SLRM has a velocity"),
        ({"reward_model_type": "spm", "eval_rules": ["reference"]}, "^`eval_rules=.* only SLRM has a velocity"),
        ({"loss_type": "thurstone", "eta": 2.0}, '^`eta` is for `loss_type="bradley_terry"`'),
    ],
)
def test_values_that_do_not_go_together(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_is_an_alias(value, tmp_path):
    assert config(tmp_path, gradient_checkpointing=value).activation_checkpointing is value


def test_command_line_and_yaml(tmp_path):
    recipe = tmp_path / "slrm.yaml"
    recipe.write_text(
        "output_dir: out\nlearning_rate: 1e-4\neval_sigmas: [0.2, 0.4]\nbf16: false\nmodel_init_kwargs:\n  revision: main\n"
        "dimension_weights:\n  visual_quality: 1\n  motion_consistency: 0.5\n"
    )
    arguments = ["--config", str(recipe), "--velocity_target", "reference", "--rho", "0.5"]
    (args,) = TrlParser((SLRMConfig,)).parse_args_and_config(arguments)
    assert args.learning_rate == 1e-4 and args.eval_sigmas == [0.2, 0.4] and args.rho == 0.5
    assert args.velocity_target == "reference" and args.model_init_kwargs == {"revision": "main"}
    assert args.dimension_weights == {"visual_quality": 1, "motion_consistency": 0.5}
    kind = ["--reward_model_type", "dina", "--dina_layers", "1", "2", "--velocity_target", "reference", "--rho"]
    (args,) = TrlParser((SLRMConfig,)).parse_args_and_config(["--config", str(recipe), *kind, str(math.log(4))])
    assert (args.reward_model_type, args.dina_layers, args.loss_type) == ("dina", [1, 2], "thurstone")
    (args,) = TrlParser((SLRMConfig,)).parse_args_and_config([*arguments, "--dimension_weights", '{"text": 2}'])
    assert args.dimension_weights == {"text": 2}
