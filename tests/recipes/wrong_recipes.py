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
    ("stages_empty", GOOD + "stages: []\n", [], [f"{AT}:4: stages = []: must be a list", "at least 1 of them"]),
    (
        "stages_items",
        GOOD + "stages:\n- {duraton: 1 epochs}\n- {duration: 1 epochs, lr: x}\n- 3\n",
        [],
        [
            "3 mistakes in the recipe:",
            f"{AT}:5: stages[0].duraton: unknown key. Did you mean 'duration'?",
            f"{AT}:6: stages[1].lr = 'x': must be a number above 0",
            f"{AT}:7: stages[2] = 3: must be a section",
        ],
    ),
    (
        "stages_share",
        GOOD + "stages:\n- {duration: 1 epochs}\n- {duration: 5%}\n",
        [],
        [f"{AT}:6: stages[1]", "'duration: 5%' is a share of nothing"],
    ),
    (
        "stages_inner",
        GOOD + "stages:\n- {freeze: '.*'}\n- {duration: 1 epochs, schedule: {decay: step}}\n",
        [],
        [
            "2 mistakes in the recipe:",
            f"{AT}:5: stages[0].duration: missing; add 'duration: ...' below 'stages:'",
            f"{AT}:6: stages[1].schedule: 'decay: step' needs",
        ],
    ),
    (
        "stages_and_freeze",
        GOOD + "freeze: '.*'\nstages: [{duration: 1 epochs}]\n",
        [],
        [f"{AT}:4: 'freeze' has no effect beside 'stages': each stage has its own. Take it out"],
    ),
    (
        "stages_and_probe",
        GOOD + "probe: {}\nstages: [{duration: 1 epochs}]\n",
        [],
        [f"{AT}:4: 'probe' trains nothing and 'stages' says what is trained when"],
    ),
    (
        "probe_and_optim",
        GOOD + "probe: {}\noptim: {lr: 1.0}\n",
        [],
        [f"{AT}:5: 'optim' has no effect beside 'probe'"],
    ),
    (
        "probe_and_augment",
        f"{NAME}\ndata: {{source: fashion_mnist, augment: [flip]}}\n{BACKBONE}\nprobe: {{}}\n",
        [],
        ["'data.augment' has no effect beside 'probe'"],
    ),
    (
        "probe_knn_strengths",
        GOOD + "probe: {kind: knn, strengths: [1.0]}\n",
        [],
        [f"{AT}:4: probe: 'strengths' has no effect with 'kind: knn'"],
    ),
    ("codes_pool", GOOD + "codes: {pool: [avg, tken]}\n", [], ["codes.pool[1] = 'tken'", "Did you mean 'token'?"]),
    ("codes_pool_idle", GOOD + "codes: {pool: max}\n", [], ["'codes.pool' has no effect on penultimate codes"]),
    ("probe_twice", GOOD + "probe: {strengths: [1.0, 1.0]}\n", [], ["'strengths' names a value twice"]),
    ("probe_batch", GOOD + "probe: {}\nbatch_size: 64\n", [], ["'batch_size' has no effect beside 'probe'"]),
    (
        "override_in_list",
        GOOD + "stages: [{duration: 1 epochs}]\n",
        ["stages.lr=1.0"],
        [f"command line: stages.lr=1.0: 'stages' is a list in {AT}:4; write all of it: stages=[{{...}}]"],
    ),
    ("codes_views", GOOD + "codes: {views: 3}\n", [], ["'codes.views' has no effect without 'data.augment'"]),
    ("missing_name", f"{DATA}\n{BACKBONE}\n", [], [f"{AT}:1: name: missing; add 'name: ...' at the top level"]),
    ("missing_section", f"{NAME}\n{BACKBONE}\n", [], [f"{AT}:1: data: missing; add a section 'data:'", "source: ..."]),
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
    ("text_for_number", GOOD + "optim: {lr: fast}\n", [], [f"{AT}:4: optim.lr = 'fast': must be a number above 0"]),
    ("quoted_number", GOOD + "optim: {lr: '1e-3'}\n", [], [f"{AT}:4: optim.lr = '1e-3'", "take the quotes off"]),
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
        [f"{AT}:4: drop_last = 'yes': must be true or false; only true and false"],
    ),
    (
        "float_for_int",
        GOOD + "batch_size: 25.6\n",
        [],
        [f"{AT}:4: batch_size = 25.6: must be a whole number of at least 1"],
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
        [f"{AT}:3: backbone.name = 18: must be text; put it in quotes"],
    ),
    ("section_is_number", GOOD + "optim: 3\n", [], [f"{AT}:4: optim = 3: must be a section"]),
    (
        "section_is_empty",
        GOOD + "optim:\n",
        [],
        [f"{AT}:4: optim = null: must be a section", "take the empty section out"],
    ),
    ("scalar_for_list", GOOD + "track: wandb\n", [], [f"{AT}:4: track = 'wandb': must be a list", "write [wandb]"]),
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
    ("duration_share", GOOD + "duration: 5%\n", [], [f"{AT}:4: 'duration: 5%' is a share of nothing"]),
    ("freeze_regex", GOOD + "freeze: '(layer1'\n", [], [f"{AT}:4: freeze = '(layer1'", "is not a regular expression"]),
    ("freeze_value", GOOD + "freeze: [{'.*': 1}]\n", [], [f"{AT}:4: freeze", "true (freeze) or false (train), not 1"]),
    (
        "rule_value",
        GOOD + "optim: {lr_rules: [{'.*': -1}]}\n",
        [],
        [f"{AT}:4: optim.lr_rules", "a number of at least 0, not -1"],
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
    (
        "bundled",
        f"{NAME}\n{DATA}\nbackbone: {{name: resnet18, weights: bundled}}\n",
        [],
        [f"{AT}:3: backbone.weights = 'bundled'", "no bundled weights in this version; use pretrained, none"],
    ),
    # keys that do not go together
    (
        "needs_path",
        f"{NAME}\ndata: {{source: folder}}\n{BACKBONE}\n",
        [],
        [f"{AT}:2: data: source 'folder' needs 'path'"],
    ),
    (
        "no_effect",
        GOOD + "schedule:\n  decay: linear\n  step_factor: 0.1\n",
        [],
        [f"{AT}:6: schedule:", "have no effect with 'decay: linear'"],
    ),
    (
        "wandb_untracked",
        GOOD + "wandb: {project: x}\n",
        [],
        [f"{AT}:4: section 'wandb' has no effect unless 'track' names wandb"],
    ),
    (
        "micro_batch",
        GOOD + "batch_size: 8\ncompute: {micro_batch_size: 9}\n",
        [],
        [f"{AT}:5: 'compute.micro_batch_size: 9' is more than"],
    ),
    # YAML
    ("duplicate", GOOD + "seed: 1\nseed: 2\n", [], [f"{AT}:5: 'seed' is given twice, first in {AT}:4"]),
    ("octal", GOOD + "seed: 010\n", [], [f"{AT}:4: '010' begins with a zero: write 10"]),
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
        [f"{AT}:4: merge keys ('<<') are not read in recipes; use 'extends'"],
    ),
    ("two_documents", GOOD + "---\nname: b\n", [], [f"{AT}:4: a second document begins here"]),
    ("key_is_number", GOOD + "loss: {class_weights: {10: 1.0}}\n", [], [f"{AT}:4: '10' as a key: keys are text"]),
    ("deep", GOOD + "head: " + "[" * 5000 + "\n", [], [f"{AT}:4: nested more than 20 deep"]),
    ("tab", GOOD + "optim:\n\tlr: 1\n", [], [f"{AT}:5: not valid YAML: a tab; indent with spaces"]),
    ("double_quoted_regex", GOOD + 'freeze: "layer1\\..*"\n', [], [f"{AT}:4: not valid YAML", "in single quotes"]),
    ("bracket", GOOD + "head: [relu, linear\n", [], [f"{AT}:", "not valid YAML", "close every bracket"]),
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
    ("override_form", GOOD, ["optim.lr"], ["command line: optim.lr: not an override; write key.path=value"]),
    (
        "override_value",
        GOOD,
        ["optim.lr=fast"],
        ["command line: optim.lr=fast: optim.lr = 'fast': must be a number above 0"],
    ),
    (
        "override_unknown",
        GOOD,
        ["optim.lrr=1"],
        ["command line: optim.lrr=1: optim.lrr: unknown key. Did you mean 'lr'"],
    ),
    ("override_section", GOOD, ["optm.lr=1"], ["command line: optm.lr=1: optm: unknown key. Did you mean 'optim'?"]),
    ("override_through_scalar", GOOD, ["optim.lr.x=1"], ["'optim.lr' takes a number above 0 and has no keys below it"]),
    (
        "override_through_value",
        GOOD + "loss: {class_weights: balanced}\n",
        ["loss.class_weights.cat=2"],
        [f"'loss.class_weights' is 'balanced' in {AT}:4"],
    ),
    ("override_empty", GOOD, ["seed="], ["command line: seed=: no value; write seed=null"]),
    ("override_dashes", GOOD, ["--seed=1"], ["command line: --seed=1: an override has no dashes; write seed=..."]),
    ("override_yaml", GOOD, ["head=[relu"], ["command line: head=[relu: not valid YAML"]),
    ("override_null", GOOD, ["seed=null"], ["command line: seed=null: seed = null: must be a whole number"]),
    (
        "override_cross",
        GOOD,
        ["data.source=folder"],
        ["command line: data.source=folder: data: source 'folder' needs 'path'"],
    ),
    # several at once, across fields, sections and places
    (
        "all_at_once",
        f"name: a b\n{DATA}\nbackbone: {{name: resnet18, in_chans: 2}}\noptim: {{lr: x}}\nduration: 5%\n"
        "schedule: {decay: step}\nwandb: {project: x}\n",
        ["seed=x"],
        [
            "7 mistakes in the recipe:",
            f"{AT}:1: name",
            f"{AT}:3: backbone.in_chans = 2",
            f"{AT}:4: optim.lr",
            f"{AT}:6: schedule: ",
            f"{AT}:7: section 'wandb'",
            f"{AT}:5: 'duration: 5%'",
            "command line: seed=x: seed = 'x'",
        ],
    ),
]
