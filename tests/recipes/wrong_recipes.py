"""Wrong recipes: what a user may write, and what the message must say.

A row is (id, text of recipe.yaml, overrides, fragments that the message must hold). `AT` in a fragment stands for the
path of the file. The command-line tests use the same table: exit 2, this message, no traceback.
"""

from __future__ import annotations

AT = "{AT}"
NAME, DATA, BACKBONE = "name: a", "data: {source: fashion_mnist}", "backbone: {name: resnet18}"
GOOD = f"{NAME}\n{DATA}\n{BACKBONE}\n"  # three lines, so what a row adds begins in line 4

WRONG_RECIPES: list[tuple[str, str, list[str], list[str]]] = [
    # unknown and missing keys
    ("unknown_key", GOOD + "optim: {lrr: 1}\n", [], [f"{AT}:4: optim.lrr: unknown key. Did you mean 'lr'"]),
    ("unknown_in_other_section", GOOD + "lr: 1\n", [], [f"{AT}:4: lr: unknown key. Did you mean 'optim.lr'?"]),
    ("unknown_synonym", GOOD + "epochs: 5\n", [], [f"{AT}:4: epochs: unknown key. Did you mean 'duration'?"]),
    (
        "unknown_section",
        GOOD + "\nqqqq:\n  x: 1\n",
        [],
        [f"{AT}:5: qqqq: unknown key. The keys of the top level are: name"],
    ),
    (
        "group_column_of_folder",
        f"{NAME}\ndata: {{source: folder, path: p, group_column: patient}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.group_column: has no effect with source 'folder'", "manifest, hub, disk"],
    ),
    (
        "group_regex_of_hub",
        f"{NAME}\ndata: {{source: hub, path: p, group_regex: a}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.group_regex: has no effect with source 'hub'", "folder, manifest"],
    ),
    (
        "group_regex_wrong",
        f"{NAME}\ndata: {{source: folder, path: p, group_regex: '(a'}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.group_regex = '(a': '(a' is not a regular expression"],
    ),
    (
        "groups_named_twice",
        f"{NAME}\ndata: {{source: manifest, path: p, group_regex: a, group_column: b}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.group_regex: both name the groups. Write one of them."],
    ),
    (
        "groups_allowed_without_groups",
        f"{NAME}\ndata: {{source: folder, path: p, groups_across_splits: allow}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.groups_across_splits: has no effect without groups. Name the groups"],
    ),
    (
        "groups_across_splits_unknown",
        f"{NAME}\ndata: {{source: folder, path: p, groups_across_splits: warn}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.groups_across_splits = 'warn': must be one of error, allow"],
    ),
    (
        "duplicates_unknown",
        f"{NAME}\ndata: {{source: folder, path: p, duplicates: remove}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.duplicates = 'remove': must be one of warn, drop, error"],
    ),
    ("engine_synonym", GOOD + "fsdp: true\n", [], [f"{AT}:4: fsdp: unknown key. Did you mean 'compute.engine'?"]),
    ("engine_unknown", GOOD + "compute: {engine: fsdp}\n", [], [f"{AT}:4: compute.engine = 'fsdp': must be"]),
    (
        "engine_fp16",
        GOOD + "compute: {engine: fsdp2, precision: fp16}\n",
        [],
        [
            f"{AT}:4: compute.precision: fp16 is not supported with engine=fsdp2,",
            "as the loss would have to be scaled over all shards. Write bf16.",
        ],
    ),
    (
        "engine_channels_last",
        GOOD + "compute: {engine: fsdp2, channels_last: true}\n",
        [],
        [
            f"{AT}:4: compute.channels_last: not supported with engine=fsdp2",
            "(FSDP2 cannot shard tensors in this memory format). Remove one of them.",
        ],
    ),
    (
        "engine_compile",
        GOOD + "compute: {engine: fsdp2, compile: true}\n",
        [],
        [f"{AT}:4: compute.compile: not supported with engine=fsdp2 (untested). Remove one of them."],
    ),
    (
        "engine_stages",
        GOOD + "compute: {engine: fsdp2}\nstages: [{duration: 1 epochs}, {duration: 1 epochs}]\n",
        [],
        [
            f"{AT}:5: stages: several stages are not supported with compute.engine=fsdp2,",
            "where parameters stay sharded to the end of the run. Write compute.engine: ddp,",
            "or a recipe for each stage.",
        ],
    ),
    (
        "rollback_is_retired",
        GOOD + "non_finite: {action: rollback}\n",
        [],
        [f"{AT}:4: non_finite.action = 'rollback': retired. Write skip"],
    ),
    (
        "distill_no_teacher",
        GOOD + "distill: {match: {layer1: layer1}}\n",
        [],
        [
            f"{AT}:4: distill.teacher: one teacher is needed, and no more. Write either 'teacher'",
            "(a backbone and its weights) or 'run' (a run folder).",
        ],
    ),
    (
        "distill_two_teachers",
        GOOD + "distill: {run: r, teacher: {name: resnet18}, match: {layer1: layer1}}\n",
        [],
        [
            f"{AT}:4: distill.teacher: one teacher is needed, and no more. Write either 'teacher'",
            "(a backbone and its weights) or 'run' (a run folder).",
        ],
    ),
    (
        "distill_random_teacher",
        GOOD + "distill: {teacher: {name: resnet18, weights: none}, match: {layer1: layer1}}\n",
        [],
        [f"{AT}:4: distill", "a teacher that knows nothing"],
    ),
    (
        "distill_of_nothing",
        GOOD + "distill: {teacher: {name: resnet18}}\n",
        [],
        [
            f"{AT}:4: distill.match: names the layers whose codes the loss weighted by 'codes' compares,",
            "so neither works alone. Name layers and give 'codes' a weight, or do neither (codes: 0).",
        ],
    ),
    (
        "distill_of_no_codes",
        GOOD + "distill: {teacher: {name: resnet18}, codes: 0}\n",
        [],
        [f"{AT}:4: distill", "nothing of the teacher is learned"],
    ),
    (
        "distill_logits_of_a_backbone",
        GOOD + "distill: {teacher: {name: resnet18}, match: {layer1: layer1}, logits: 1.0}\n",
        [],
        [
            f"{AT}:4: distill.logits: needs a teacher that knows the classes. Write 'run',",
            "the folder of a run, in place of 'teacher'.",
        ],
    ),
    (
        "distill_idle_temperature",
        GOOD + "distill: {teacher: {name: resnet18}, match: {layer1: layer1}, temperature: 2.0}\n",
        [],
        [f"{AT}:4: distill.temperature: has no effect with logits=0. Remove it."],
    ),
    (
        "distill_idle_loss",
        GOOD + "distill: {run: r, codes: 0, logits: 1, labels: 0}\nloss: {logit_adjustment: 1}\n",
        [],
        [f"{AT}:5: loss: has no effect with distill.labels=0: nothing is learned from labels. Remove it."],
    ),
    (
        "distill_mixup",
        GOOD + "distill: {run: r, match: {layer1: layer1}}\n",
        ["data.augment=[mixup]"],
        [
            "command line: data.augment=[mixup]: data.augment: mixup is not supported with 'distill',",
            "whose teacher is queried for one image at a time. Remove it.",
        ],
    ),
    (
        "distill_one_view",
        GOOD + "distill: {run: r, match: {layer1: layer1}}\n",
        ["data.augment=[flip]"],
        [
            "command line: data.augment=[flip]: data.augment:",
            "needs codes.views of at least 2 with 'distill'. Write codes.views:",
            "so many augmented views of each image are shown to the teacher, once, and to the student, one an epoch.",
        ],
    ),
    (
        "distill_fsdp2",
        GOOD + "distill: {run: r, match: {layer1: layer1}}\ncompute: {engine: fsdp2}\n",
        [],
        [f"{AT}:5: compute.engine: fsdp2 is not supported with 'distill'. Write ddp."],
    ),
    (
        "distill_keep",
        GOOD + "distill: {run: r, match: {layer1: layer1}}\ncodes: {keep: never}\n",
        [],
        [
            f"{AT}:5: codes.keep: has no effect with 'distill',",
            "where the teacher's codes are cached in any case. Remove it.",
        ],
    ),
    (
        "focal_gamma_of_nobody",
        GOOD + "loss: {focal_gamma: 1.0}\n",
        [],
        [f"{AT}:4: loss.focal_gamma: has no effect with kind=cross_entropy. Remove it, or write kind: focal."],
    ),
    (
        "focal_and_smoothing",
        GOOD + "loss: {kind: focal, label_smoothing: 0.1}\n",
        [],
        [f"{AT}:4: loss.label_smoothing: is not supported with kind=focal. Remove it."],
    ),
    (
        "twice_for_rare_classes",
        GOOD + "loss: {logit_adjustment: 1, class_weights: balanced}\n",
        [],
        [
            f"{AT}:4: loss.logit_adjustment: makes up for rare classes as class_weights does,",
            "and both would do it twice. Remove one of them.",
        ],
    ),
    (
        "distill_loss_of_nobody",
        GOOD + "evaluate: {select: distill_loss}\n",
        [],
        [f"{AT}:4: evaluate.select: distill_loss needs 'distill'. Write another figure."],
    ),
    (
        "distill_probe",
        GOOD + "distill: {run: r, match: {layer1: layer1}}\nprobe: {}\n",
        [],
        [f"{AT}:4: distill: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    (
        "engine_probe",
        GOOD + "compute: {engine: fsdp2}\nprobe: {}\n",
        [],
        [f"{AT}:4: compute.engine: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    ("stages_empty", GOOD + "stages: []\n", [], [f"{AT}:4: stages = []: must be a list", "at least 1 of them"]),
    (
        "stages_items_after_one_that_is_none",
        GOOD + "stages:\n- no\n- {}\n",
        [],
        [
            "2 mistakes in the recipe:",
            f"{AT}:5: stages[0] = 'no': must be a section",
            f"{AT}:6: stages[1].duration: missing",
        ],
    ),
    (
        "stages_items",
        GOOD + "stages:\n- {duraton: 1 epochs}\n- {duration: 1 epochs, lr: x}\n- 3\n",
        [],
        [
            "3 mistakes in the recipe:",
            f"{AT}:5: stages[0].duraton: unknown key. Did you mean 'duration'?",
            f"{AT}:6: stages[1].lr = 'x': must be a number from 1e-12 to 1e+38",
            f"{AT}:7: stages[2] = 3: must be a section",
        ],
    ),
    (
        "stages_share",
        GOOD + "stages:\n- {duration: 1 epochs}\n- {duration: 5%}\n",
        [],
        [f"{AT}:6: stages[1].duration: 5% is a share of nothing. Write epochs, steps or images."],
    ),
    (
        "stages_inner",
        GOOD + "stages:\n- {freeze: '.*'}\n- {duration: 1 epochs, schedule: {decay: step}}\n",
        [],
        [
            "2 mistakes in the recipe:",
            f"{AT}:5: stages[0].duration: missing.",
            "Add 'duration: ...' below 'stages:'; it takes a duration: '10 epochs', '500 steps',",
            "'64000 images' or '5%'.",
            f"{AT}:6: stages[1].schedule.step_every: missing with decay=step.",
            "Write both 'step_every' and 'step_factor'.",
        ],
    ),
    (
        "stages_and_freeze",
        GOOD + "freeze: '.*'\nstages: [{duration: 1 epochs}]\n",
        [],
        [f"{AT}:4: freeze: has no effect with 'stages': each stage has its own. Remove it."],
    ),
    (
        "stages_and_probe",
        GOOD + "probe: {}\nstages: [{duration: 1 epochs}]\n",
        [],
        [f"{AT}:4: probe: a probe trains nothing, but 'stages' says what is trained when. Remove one of them."],
    ),
    (
        "probe_and_optim",
        GOOD + "probe: {}\noptim: {lr: 1.0}\n",
        [],
        [f"{AT}:5: optim: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    (
        "two_policies",
        f"{NAME}\ndata: {{source: fashion_mnist, augment: [randaugment, trivialaugment_geometric]}}\n{BACKBONE}\n",
        [],
        ["trivialaugment_geometric and randaugment are policies for the same thing. Name one."],
    ),
    (
        "too_far_a_rotation",
        f"{NAME}\ndata: {{source: fashion_mnist, augment: [{{rotation: 200}}]}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.augment", "'rotation' takes the most degrees to either side, from 0 to 180, not 200"],
    ),
    (
        "sampling_power",
        f"{NAME}\ndata: {{source: fashion_mnist, sampling: 1.5}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.sampling = 1.5: must be"],
    ),
    (
        "sampling_and_mixup",
        f"{NAME}\ndata: {{source: fashion_mnist, sampling: balanced, augment: [mixup]}}\n{BACKBONE}\n",
        [],
        [
            f"{AT}:2: data.sampling: is not supported with mixup, which draws the other image evenly.",
            "Remove one of them.",
        ],
    ),
    (
        "sampling_and_weights",
        f"{NAME}\ndata: {{source: fashion_mnist, sampling: balanced}}\n{BACKBONE}\nloss: {{class_weights: balanced}}\n",
        [],
        [f"{AT}:2: data.sampling: makes up for rare classes as loss.class_weights does, and both would do it twice."],
    ),
    (
        "sampling_of_a_probe",
        f"{NAME}\ndata: {{source: fashion_mnist, sampling: balanced}}\n{BACKBONE}\nprobe: {{}}\n",
        [],
        [f"{AT}:2: data.sampling: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    (
        "crop_mode",
        f"{NAME}\ndata: {{source: fashion_mnist, crop_mode: stretch}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.crop_mode = 'stretch': must be"],
    ),
    (
        "probe_and_augment",
        f"{NAME}\ndata: {{source: fashion_mnist, augment: [flip]}}\n{BACKBONE}\nprobe: {{}}\n",
        [],
        [f"{AT}:2: data.augment: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    (
        "probe_knn_strengths",
        GOOD + "probe: {kind: knn, strengths: [1.0]}\n",
        [],
        [f"{AT}:4: probe.strengths: has no effect with kind=knn. Remove it; 'neighbours' is for this kind."],
    ),
    ("codes_pool", GOOD + "codes: {pool: [avg, tken]}\n", [], ["codes.pool[1] = 'tken'", "Did you mean 'token'?"]),
    (
        "codes_pool_idle",
        GOOD + "codes: {pool: max}\n",
        [],
        [
            f"{AT}:4: codes.pool: has no effect on penultimate codes, which the backbone pools itself.",
            "Remove it, or name layers in codes.layer.",
        ],
    ),
    (
        "probe_twice",
        GOOD + "probe: {strengths: [1.0, 1.0]}\n",
        [],
        [f"{AT}:4: probe.strengths: names a value twice. Name each once."],
    ),
    (
        "probe_batch",
        GOOD + "probe: {}\nbatch_size: 64\n",
        [],
        [f"{AT}:5: batch_size: has no effect with 'probe': a probe trains nothing. Remove it."],
    ),
    (
        "override_in_list",
        GOOD + "stages: [{duration: 1 epochs}]\n",
        ["stages.lr=1.0"],
        [f"command line: stages.lr=1.0: stages: is a list in {AT}:4. Write all of it: stages=[{{...}}]."],
    ),
    (
        "codes_views",
        GOOD + "codes: {views: 3}\n",
        [],
        [
            f"{AT}:4: codes.views: has no effect without data.augment, as all views would be the same.",
            "Remove it, or write data.augment.",
        ],
    ),
    (
        "missing_name",
        f"{DATA}\n{BACKBONE}\n",
        [],
        [f"{AT}:1: name: missing. Add 'name: ...' at the top level; it takes text."],
    ),
    (
        "missing_section",
        f"{NAME}\n{BACKBONE}\n",
        [],
        [f"{AT}:1: data: missing. Add a section 'data:' with at least 'source: ...' below it."],
    ),
    (
        "missing_in_section",
        f"{NAME}\n{DATA}\nbackbone: {{}}\n",
        [],
        [f"{AT}:3: backbone.name: missing", "below 'backbone:'"],
    ),
    (
        "secret",
        GOOD + "track: [wandb]\nwandb: {api_key: hunter2}\n",
        [],
        [f"{AT}:5: wandb.api_key: keys and passwords never belong"],
    ),
    (
        "secret_override",
        GOOD + "track: [wandb]\n",
        ["wandb.api_key=hunter2"],
        ["command line: wandb.api_key=...: wandb.api_key: keys and"],
    ),
    # values
    (
        "text_for_number",
        GOOD + "optim: {lr: fast}\n",
        [],
        [f"{AT}:4: optim.lr = 'fast': must be a number from 1e-12 to 1e+38"],
    ),
    (
        "quoted_number",
        GOOD + "optim: {lr: '1e-3'}\n",
        [],
        [f"{AT}:4: optim.lr = '1e-3': must be a number from 1e-12 to 1e+38. Take the quotes off."],
    ),
    (
        "out_of_range",
        GOOD + "loss:\n  label_smoothing: 1.5\n",
        [],
        [f"{AT}:5: loss.label_smoothing = 1.5", "from 0 to below 1"],
    ),
    (
        "yes_for_true",
        GOOD + "drop_last: yes\n",
        [],
        [
            f"{AT}:4: drop_last = 'yes': must be true or false. Only true and false,",
            "in lower case and without quotes, are booleans.",
        ],
    ),
    (
        "float_for_int",
        GOOD + "batch_size: 25.6\n",
        [],
        [f"{AT}:4: batch_size = 25.6: must be a whole number from 1 to 10000000"],
    ),
    ("bool_for_int", GOOD + "seed: true\n", [], [f"{AT}:4: seed = true: must be a whole number from 0"]),
    (
        "one_of",
        GOOD + "schedule: {decay: cosin}\n",
        [],
        [f"{AT}:4: schedule.decay = 'cosin'", "Did you mean 'cosine'?"],
    ),
    (
        "number_for_text",
        f"{NAME}\n{DATA}\nbackbone: {{name: 18}}\n",
        [],
        [f"{AT}:3: backbone.name = 18: must be text. Put it in quotes."],
    ),
    ("section_is_number", GOOD + "optim: 3\n", [], [f"{AT}:4: optim = 3: must be a section"]),
    (
        "section_is_empty",
        GOOD + "optim:\n",
        [],
        [
            f"{AT}:4: optim = null: must be a section (keys and values, one a line, indented below it).",
            "Take the empty section out, or write a key below it.",
        ],
    ),
    (
        "scalar_for_list",
        GOOD + "track: wandb\n",
        [],
        [
            f"{AT}:4: track = 'wandb': must be a list, each item one of wandb, tensorboard, aim, clearml,",
            "comet_ml, dvclive, mlflow, swanlab, trackio. Write [wandb].",
        ],
    ),
    (
        "item_of_list",
        GOOD + "track:\n - wandb\n - wandbb\n",
        [],
        [f"{AT}:6: track[1] = 'wandbb'", "Did you mean 'wandb'"],
    ),
    ("run_name", f"name: a/b\n{DATA}\n{BACKBONE}\n", [], [f"{AT}:1: name = 'a/b': a name has 1 to 100 letters"]),
    (
        "duration_without_unit",
        GOOD + "duration: 5\n",
        [],
        [f"{AT}:4: duration = 5: a duration needs a unit", "'10 epochs'"],
    ),
    ("duration_unit", GOOD + "duration: 5 days\n", [], [f"{AT}:4: duration = '5 days': unknown unit 'days'"]),
    (
        "duration_share",
        GOOD + "duration: 5%\n",
        [],
        [f"{AT}:4: duration: 5% is a share of nothing. Write epochs, steps or images."],
    ),
    ("freeze_regex", GOOD + "freeze: '(layer1'\n", [], [f"{AT}:4: freeze = '(layer1'", "is not a regular expression"]),
    ("freeze_value", GOOD + "freeze: [{'.*': 1}]\n", [], [f"{AT}:4: freeze", "true (freeze) or false (train), not 1"]),
    (
        "rule_value",
        GOOD + "optim: {lr_rules: [{'.*': -1}]}\n",
        [],
        [f"{AT}:4: optim.lr_rules", "a number from 0 to 1e+06, not -1"],
    ),
    (
        "head_layer",
        GOOD + "head: [{liner: 4}, linear]\n",
        [],
        [f"{AT}:4: head[0]", "unknown head layer 'liner'. Did you mean 'linear'"],
    ),
    ("head_end", GOOD + "head: [relu]\n", [], [f"{AT}:4: head = ['relu']: a head ends in 'linear'"]),
    (
        "augmentation",
        f"{NAME}\ndata:\n  source: fashion_mnist\n  augment: [flip, cropp]\n{BACKBONE}\n",
        [],
        [f"{AT}:4: data.augment[1] = 'cropp': unknown augmentation 'cropp'. Did you mean 'crop'"],
    ),
    (
        "options_value",
        GOOD + "optim: {options: {betas: x}}\n",
        [],
        [f"{AT}:4: optim.options.betas = 'x': must be a number"],
    ),
    (
        "class_weight",
        GOOD + "loss: {class_weights: {cat: x}}\n",
        [],
        [f"{AT}:4: loss.class_weights.cat = 'x': must be a number"],
    ),
    # keys that do not go together
    (
        "needs_path",
        f"{NAME}\ndata: {{source: folder}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data.path: missing for source 'folder'. Write where it is."],
    ),
    (
        "no_effect",
        GOOD + "schedule:\n  decay: linear\n  step_factor: 0.1\n",
        [],
        [f"{AT}:6: schedule.step_factor: has no effect with decay=linear. Remove it, or write decay: step."],
    ),
    (
        "wandb_untracked",
        GOOD + "wandb: {project: x}\n",
        [],
        [f"{AT}:4: wandb: has no effect unless wandb is tracked. Write track: [wandb]."],
    ),
    (
        "micro_batch",
        GOOD + "batch_size: 8\ncompute: {micro_batch_size: 9}\n",
        [],
        [f"{AT}:5: compute.micro_batch_size: 9 is more than batch_size=8. Lower it, or remove it."],
    ),
    # YAML
    ("duplicate", GOOD + "seed: 1\nseed: 2\n", [], [f"{AT}:5: 'seed' is given twice, first in {AT}:4"]),
    (
        "octal",
        GOOD + "seed: 010\n",
        [],
        [f"{AT}:4: '010' begins with a zero. Write 10 for the number, or '010' in quotes for text."],
    ),
    ("infinite", GOOD + "optim: {lr: .inf}\n", [], [f"{AT}:4: '.inf': numbers in recipes are finite"]),
    ("huge_number", GOOD + "optim: {lr: 1e999}\n", [], [f"{AT}:4: '1e999' is too large"]),
    (
        "python_tag",
        GOOD + "seed: !!python/object/apply:os.system ['true']\n",
        [],
        [f"{AT}:4: the tag", "tags are not read"],
    ),
    ("own_tag", GOOD + "seed: !env SEED\n", [], [f"{AT}:4: the tag '!env'"]),
    ("anchor", GOOD + "seed: &s 1\n", [], [f"{AT}:4: '&s': anchors and aliases are not read"]),
    ("alias", GOOD + "seed: *s\n", [], [f"{AT}:4: '*s': anchors and aliases are not read"]),
    (
        "merge_key",
        GOOD + "optim: {<<: {lr: 1}}\n",
        [],
        [f"{AT}:4: merge keys ('<<') are not read in recipes. Use 'extends'."],
    ),
    ("two_documents", GOOD + "---\nname: b\n", [], [f"{AT}:4: a second document begins here"]),
    ("key_is_number", GOOD + "loss: {class_weights: {10: 1.0}}\n", [], [f"{AT}:4: '10' as a key: keys are text"]),
    ("deep", GOOD + "head: " + "[" * 5000 + "\n", [], [f"{AT}:4: nested more than 20 deep"]),
    (
        "tab",
        GOOD + "optim:\n\tlr: 1\n",
        [],
        [
            f"{AT}:5: not valid YAML: found character '\\t' that cannot start any token.",
            "Indent with spaces instead of a tab.",
        ],
    ),
    ("double_quoted_regex", GOOD + 'freeze: "layer1\\..*"\n', [], [f"{AT}:4: not valid YAML", "in single quotes"]),
    (
        "bracket",
        GOOD + "head: [relu, linear\n",
        [],
        [
            f"{AT}:5: not valid YAML: expected ',' or ']', but got '<stream end>'. Close every bracket,",
            "and put regular expressions and other signs in single quotes.",
        ],
    ),
    ("empty", "# nothing\n", [], [f"{AT}:1: the file is empty"]),
    ("top_level_list", "- name: a\n", [], [f"{AT}:1: not a recipe: the top level must be keys and values"]),
    ("control_character", GOOD + "track: ['\x07']\n", [], [f"{AT}:4: holds the control character #x0007"]),
    # extends
    ("extends_missing", GOOD + "extends: nowhere.yaml\n", [], [f"{AT}:4: there is no file", "nowhere.yaml"]),
    (
        "extends_itself",
        GOOD + "extends: recipe.yaml\n",
        [],
        [f"{AT}:4: extends = 'recipe.yaml': goes round in a circle"],
    ),
    (
        "extends_outside",
        GOOD + "extends: ../../etc/passwd\n",
        [],
        [f"{AT}:4: extends = '../../etc/passwd': lies outside"],
    ),
    ("extends_two", GOOD + "extends: [a.yaml, b.yaml]\n", [], [f"{AT}:4: extends: takes the name of one recipe file"]),
    # overrides
    (
        "override_form",
        GOOD,
        ["optim.lr"],
        ["command line: optim.lr: not an override. Write key.path=value, such as optim.lr=1e-3."],
    ),
    (
        "override_value",
        GOOD,
        ["optim.lr=fast"],
        ["command line: optim.lr=fast: optim.lr = 'fast': must be a number from 1e-12 to 1e+38"],
    ),
    (
        "override_unknown",
        GOOD,
        ["optim.lrr=1"],
        ["command line: optim.lrr=1: optim.lrr: unknown key. Did you mean 'lr'"],
    ),
    ("override_section", GOOD, ["optm.lr=1"], ["command line: optm.lr=1: optm: unknown key. Did you mean 'optim'?"]),
    (
        "override_through_scalar",
        GOOD,
        ["optim.lr.x=1"],
        [
            "command line: optim.lr.x=1: optim.lr: takes a number from 1e-12 to 1e+38 and has no keys below it.",
            "Write optim.lr=...",
        ],
    ),
    (
        "override_through_value",
        GOOD + "loss: {class_weights: balanced}\n",
        ["loss.class_weights.cat=2"],
        [
            f"command line: loss.class_weights.cat=2: loss.class_weights: is 'balanced' in {AT}:4.",
            "Write loss.class_weights={...}.",
        ],
    ),
    (
        "override_empty",
        GOOD,
        ["seed="],
        ["command line: seed=: no value. Write seed=null for none, or omit the override."],
    ),
    ("override_dashes", GOOD, ["--seed=1"], ["command line: --seed=1: an override has no dashes. Write seed=..."]),
    ("override_yaml", GOOD, ["head=[relu"], ["command line: head=[relu: not valid YAML"]),
    ("override_null", GOOD, ["seed=null"], ["command line: seed=null: seed = null: must be a whole number"]),
    (
        "override_cross",
        GOOD,
        ["data.source=folder"],
        ["command line: data.source=folder: data.path: missing for source 'folder'. Write where it is."],
    ),
    # several at once, across fields, sections and places
    (
        "all_at_once",
        f"name: a b\n{DATA}\nbackbone: {{name: resnet18, in_chans: 2}}\noptim: {{lr: x}}\nduration: 5%\n"
        "schedule: {decay: step}\nwandb: {project: x}\n",
        ["seed=x"],
        [
            "7 mistakes in the recipe:",
            f"{AT}:1: name = 'a b': a name has 1 to 100 letters, digits, '.', '_' or '-',",
            "and begins with a letter or digit",
            f"{AT}:3: backbone.in_chans = 2: must be one of 1, 3",
            f"{AT}:4: optim.lr = 'x': must be a number from 1e-12 to 1e+38",
            f"{AT}:5: duration: 5% is a share of nothing. Write epochs, steps or images.",
            f"{AT}:6: schedule.step_every: missing with decay=step. Write both 'step_every' and 'step_factor'.",
            f"{AT}:7: wandb: has no effect unless wandb is tracked. Write track: [wandb].",
            "command line: seed=x: seed = 'x': must be a whole number from 0 to 2^63-1",
        ],
    ),
]
