"""The shipped tasks as they render, the strictness of the reader, and how names are chosen."""

import json
import time

import pytest

from core.errors import InputError
from evals.tasks.catalogue import catalogue, read_task_file, select
from evals.tasks.task import ExactMatch, Filter
from evals.tasks.template import render

CHOICE = """
name = "mine"
kind = "multiple_choice"
dataset = "org/name"
split = "test"
prompt = "{q}"
choices = "{c}"
answer = "{a}"
"""
FAMILY = """
name = "mine"
kind = "loglikelihood"
dataset = "org/name"
config = "{member}"
split = "test"
description = "About {member|words}."
prompt = "{q} {{x}} {member}"
target = " {a}"
group = "mine"
[groups.all]
members = ["mine", "other"]
metrics = ["acc"]
[groups.mine]
version = 2
[groups.other]
[members]
one_two = {}
three = { group = "other", target = "{a}", size = 3 }
"""


@pytest.fixture
def read(tmp_path):
    def read(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_task_file(path)

    return read


def rendered(name: str, row: dict):
    """(prompts, continuations, answer) of a row as the task's templates give them."""
    task = catalogue()[0][name]
    fields = dict(row)
    for key, template in task.fields.items():
        fields[key] = render(template, fields, key)

    def all_of(value):
        if isinstance(value, tuple):
            return [render(template, fields, name) for template in value]
        text = render(value, fields, name)
        return text if isinstance(text, list) else [str(text)]

    answer = None if task.answer is None else render(task.answer, fields, name)
    return all_of(task.prompt), all_of(task.choices or task.target), answer


SCIENCE = {
    "question": "Which is a metal?",
    "choices": {"text": ["iron", "wood", "air"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
EXAM = {"question": " Which? ", "choices": ["p", "q", "r", "s"], "answer": 3}
LETTERED = "Which?\nA. p\nB. q\nC. r\nD. s\nAnswer:"
SENTENCE = {
    "sentence": "Ann asked Eve because _ 's keys were lost. ",
    "option1": "Ann",
    "option2": "Eve",
    "answer": "2",
}


@pytest.mark.parametrize(
    ("name", "row", "prompts", "continuations", "answer"),
    [
        ("arc_easy", SCIENCE, ["Question: Which is a metal?\nAnswer:"], ["iron", "wood", "air"],
         "1"),
        ("hellaswag",
         {"activity_label": "Cooking", "ctx_a": "A man [step] cuts.", "ctx_b": "he Then",
          "endings": [" stops [x] now.", "eats."], "label": "1"},
         ["Cooking: A man cuts. He then"], ["stops now.", "eats."], "1"),
        ("winogrande", SENTENCE, ["Ann asked Eve because Ann", "Ann asked Eve because Eve"],
         ["'s keys were lost."], "2"),
        ("piqa", {"goal": "Dry it.", "sol1": " Wait.", "sol2": "Run.", "label": 0},
         ["Question: Dry it.\nAnswer:"], [" Wait.", "Run."], 0),
        ("mmlu_anatomy", EXAM, [LETTERED], ["A", "B", "C", "D"], 3),
        ("wmdp_bio", EXAM, [LETTERED], ["A", "B", "C", "D"], 3),
        ("wmdp_bio_robust_dual_use_virology", EXAM, [LETTERED], ["A", "B", "C", "D"], 3),
        ("wmdp_bio_cloze_verified", EXAM, ["Question: Which?\nAnswer:"], ["p", "q", "r", "s"], 3),
        ("lambada_openai", {"text": "the end  is near"}, ["the end  is"], [" near"], None),
        ("arithmetic_2da", {"context": "\nQ: What is 1 plus 2?\n\nA:", "completion": " 3"},
         ["Question: What is 1 plus 2?\nAnswer:"], [" 3"], None),
        ("gsm8k", {"question": "How many?", "answer": "6*9\n#### 54"},
         ["Question: How many?\nAnswer:"], ["6*9\n#### 54"], None),
    ],
)  # fmt: skip
def test_shipped_tasks_render(name, row, prompts, continuations, answer):
    assert rendered(name, row) == (prompts, continuations, answer)


def test_probes_render():
    """With the token of the fact and without, and no blank doubled or lost before the product."""
    texts = {}
    for name in catalogue()[0]:
        if name.startswith("mul_probes_"):
            (prompt,), (target,), _ = rendered(name, {"a": 9, "b": 6, "c": 54})
            texts[name.removeprefix("mul_probes_")] = prompt, target
    assert texts == {
        "star": ("9*6=", "54"),
        "star_spaced": ("9 * 6 =", " 54"),
        "times_spaced": ("9 × 6 =", " 54"),
        "x": ("9x6=", "54"),
        "words": ("Question: What is 9 times 6?\nAnswer:", " 54"),
        "star_facts": ("<MUL_6_9_54>=", "54"),
        "star_spaced_facts": ("<MUL_6_9_54> =", " 54"),
        "times_spaced_facts": ("<MUL_6_9_54> =", " 54"),
        "x_facts": ("<MUL_6_9_54>=", "54"),
    } | {
        f"generate_{form}": (prompt, "54")
        for form, (prompt, _) in texts.items()
        if not form.startswith("generate_")
    }


def test_query_forms():
    tasks = catalogue()[0]
    for name in ("arc_easy", "arc_challenge"):
        query = tasks[name].query
        assert query is not None and isinstance(query.choices, str)
        prompt = "Question: Which is a metal?\nA. iron\nB. wood\nC. air\nAnswer:"
        assert render(query.prompt, SCIENCE, name) == prompt
        assert render(query.choices, SCIENCE, name) == ["A", "B", "C"]
    query = tasks["winogrande"].query
    assert query is not None
    prompt = f"{SENTENCE['sentence']}\nOptions: Ann, Eve\nAnswer:"
    assert render(query.prompt, SENTENCE, "winogrande") == prompt
    assert [render(choice, SENTENCE, "winogrande") for choice in query.choices] == ["Ann", "Eve"]
    assert {name for name, task in tasks.items() if task.query} == {
        "arc_easy", "arc_challenge", "winogrande"}  # fmt: skip


def test_shipped_groups_and_sizes():
    tasks, groups = catalogue()
    sizes = {"mmlu_stem": 3153, "mmlu_other": 3107, "mmlu_social_sciences": 3077,
             "mmlu_humanities": 4705, "wmdp_bio_robust": 868}  # fmt: skip
    for name, size in sizes.items():
        assert sum(tasks[member].size or 0 for member in groups[name].members) == size
        assert groups[name].metrics == ("acc",)
    assert groups["mmlu"].members == tuple(name for name in sizes if name.startswith("mmlu"))
    leaves = select(["mmlu"]).tasks
    assert len(leaves) == 57 and sum(task.size or 0 for task in leaves) == 14042
    assert groups["mmlu_social_sciences"].alias == "social sciences"
    assert groups["mmlu"].version == groups["mmlu_stem"].version == 2
    assert len(groups["arithmetic"].members) == 10 and groups["arithmetic"].metrics == ()
    assert all(task.size for task in tasks.values())


def test_shipped_settings():
    """What lm-evaluation-harness 0.4.13 gives in its own configuration of these tasks."""
    tasks = catalogue()[0]
    assert {n: t.shots for n, t in tasks.items() if t.shots} == {"gsm8k": 5}
    assert {n.split("_")[0] for n, t in tasks.items() if t.shots == 0} == {
        "wmdp", "wikitext", "mul"}  # fmt: skip
    assert {n.split("_")[0] for n, t in tasks.items() if t.sampler == "first"} == {"mmlu"}
    assert {n.split("_")[0] for n, t in tasks.items() if t.sampler == "random_but_self"} == {
        "hellaswag", "winogrande", "piqa", "arithmetic"}  # fmt: skip
    assert tasks["mmlu_us_foreign_policy"].description == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    )
    assert tasks["arithmetic_1dc"].delimiter == "" and tasks["lambada_openai"].delimiter == " "
    gsm8k = tasks["gsm8k"]
    assert gsm8k.until == ("Question:", "</s>", "<|im_end|>")
    assert gsm8k.filters == (
        Filter("strict-match", r"#### (\-?[0-9\.\,]+)", 0),
        Filter("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    )
    assert gsm8k.exact_match == ExactMatch((",", r"\$", r"(?s).*#### ", r"\.$"), True)


def test_reading_is_quick():
    catalogue.cache_clear()
    start = time.perf_counter()
    catalogue()
    assert time.perf_counter() - start < 1  # about 0.03 s where nothing else runs


def test_select():
    def names(*asked):
        selection = select(asked)
        return [t.name for t in selection.tasks], [g.name for g in selection.groups]

    assert names("piqa, arc_*", "piqa") == (["piqa", "arc_easy", "arc_challenge"], [])
    tasks, groups = names("mmlu_anatomy,mmlu")
    assert tasks[:2] == ["mmlu_anatomy", "mmlu_abstract_algebra"] and len(tasks) == 57
    assert groups == ["mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert names("mmlu_stem")[1] == ["mmlu_stem"]
    assert len(names("arithmetic_?da")[0]) == 4
    with pytest.raises(InputError, match="'hellasawg'; did you mean hellaswag"):
        select(["hellasawg"])
    with pytest.raises(InputError, match="called 'mmlu_x[*]'"):
        select(["mmlu_x*"])
    with pytest.raises(InputError, match="no task is named"):
        select([" , "])


def test_family(read):
    tasks, groups = read(FAMILY)
    one, three = tasks["mine_one_two"], tasks["mine_three"]
    assert list(tasks) == ["mine_one_two", "mine_three"]
    assert (one.config, one.description, one.size) == ("one_two", "About one two.", None)
    assert render(one.prompt, {"q": "Q"}, "row") == "Q {x} one_two"
    assert (three.config, three.target, three.size) == ("three", "{a}", 3)
    assert groups["all"].members == ("mine", "other") and groups["all"].metrics == ("acc",)
    assert groups["mine"].members == ("mine_one_two",) and groups["mine"].version == 2
    assert groups["other"].members == ("mine_three",) and groups["other"].metrics == ()


def test_a_users_file(tmp_path, read):
    read(FAMILY)
    selection = select([str(tmp_path / "mine.toml"), "piqa"])
    assert [task.name for task in selection.tasks] == ["mine_one_two", "mine_three", "piqa"]
    assert [group.name for group in selection.groups] == ["all", "mine", "other"]
    toml = read(CHOICE + 'metrics = ["acc_norm"]\n')[0]["mine"]
    fields = {key: getattr(toml, key) for key in ("name", "kind", "dataset", "split", "prompt",
                                                  "choices", "answer", "metrics")}  # fmt: skip
    as_json = read(json.dumps(fields | {"config": None}), "mine.json")[0]["mine"]
    assert {key: getattr(as_json, key) for key in fields} == fields


@pytest.mark.parametrize("dataset", ["items.jsonl", "items.parquet", "folder"])
def test_datasets_beside_the_file(tmp_path, read, dataset):
    (tmp_path / "folder").mkdir()
    task = read(CHOICE.replace("org/name", dataset))[0]["mine"]
    assert task.dataset == str(tmp_path / dataset)
    assert read(CHOICE)[0]["mine"].dataset == "org/name"


def without(key: str) -> str:
    return "\n".join(line for line in CHOICE.splitlines() if not line.startswith(f"{key} "))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CHOICE + "promt = 'x'", "mine.toml: unknown key 'promt'; did you mean prompt"),
        (CHOICE + "where = 'x'", "unknown key 'where'"),
        (CHOICE + "shots = '5'", "'shots' must be a whole number, got '5'"),
        (CHOICE + "shots = true", "'shots' must be a whole number, got True"),
        (CHOICE + "shots = -1", "'shots' must be at least 0"),
        (CHOICE + "size = 0", "'size' must be at least 1"),
        (CHOICE + "version = '1'", "'version' must be a number"),
        (CHOICE + "metrics = 'acc'", "'metrics' must be a list"),
        (CHOICE + "metrics = []", "'metrics' is missing"),
        (CHOICE + "metrics = ['f1']", "metric 'f1' is not of a multiple_choice task; it has acc"),
        (CHOICE + "metrics = [1]", "'metrics' entry 0 must be a text, got 1"),
        (CHOICE + "labels = {}", "'labels' must be a text or a list, got {}"),
        (CHOICE + "sampler = 'some'", "'sampler' must be one of random, random_but_self, first"),
        (CHOICE + "until = ['x']", "'until' means nothing to this multiple_choice task"),
        (CHOICE + "target = 'x'", "'target' means nothing"),
        (CHOICE + "shots = 2", "2 shots need a 'pool' split or 'examples'"),
        (CHOICE + "pool = 'train'\nexamples = [{ q = 'x' }]", "give one of them"),
        (CHOICE + "group = 'g'", "group 'g' is unknown; describe it in"),
        (CHOICE + "[groups.g]", "group 'g' has no members"),
        (CHOICE + "[groups.g]\nmembers = ['mime']", "names 'mime', .* did you mean mine"),
        (CHOICE + "[groups.g]\nmembers = ['g']", "names 'g', which is no task and no later group"),
        (CHOICE + "[groups.g]\nmember = ['mine']", "group 'g': unknown key 'member'; did you mean"),
        (CHOICE + "[query]\nprompt = 'x'", "'query': 'choices' is missing"),
        (CHOICE + "[query]\nprompt = 'x'\nchoices = ['{']", "'query': template '{' cannot be read"),
        (CHOICE + "members = 3", "members must be a table"),
        (CHOICE + "[members]\nx = 3", "member 'x' must be a table"),
        (CHOICE + "[members]\n'a/b' = {}", "'mine_a/b' is no task's name"),
        (CHOICE.replace("{q}", "{q|stirp}"), "'prompt': template '{q|stirp}' has a filter 'stirp'"),
        (CHOICE.replace('"{q}"', '["{q}", "{r}"]'), "'target' is missing"),
        (CHOICE.replace("multiple_choice", "multi"), "'kind' must be one of multiple_choice, "),
        (CHOICE.replace("multiple_choice", "generate"), "'target' is missing; a generate task"),
        (without("name"), "'name' must be the task's name, got None"),
        (without("kind"), "'kind' is missing; it must be one of"),
        (without("answer"), "'answer' is missing; a multiple_choice task needs it"),
        (without("choices"), "'choices' is missing"),
        (without("dataset"), "'dataset' is missing"),
        (without("split"), "'split' is missing"),
        ("kind = ", "mine.toml is not TOML"),
    ],
)  # fmt: skip
def test_what_the_reader_refuses(read, text, message):
    with pytest.raises(InputError) as refused:
        read(text)
    assert message.split(" .* ")[0] in str(refused.value)
    assert message.split(" .* ")[-1] in str(refused.value)


GENERATE = """
name = "mine"
kind = "generate"
dataset = "org/name"
split = "test"
prompt = "{q}"
target = "{a}"
metrics = ["exact_match"]
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[filters]]\nname = 'f'\nregex = '('", "'(' is no regular expression"),
        ("[exact_match]\nignore = ['[']", "'[' is no regular expression"),
        ("[[filters]]\nname = 'f'", "'filters' entry 0: 'regex' is missing"),
        ("[[filters]]\nname = 'f'\nregex = 'x'\nselect = 'a'", "'select' must be a whole number"),
        ("filters = ['x']", "'filters' entry 0 must be a table"),
        ("new_tokens = 0", "'new_tokens' must be at least 1"),
        ("choices = ['a']", "'choices' means nothing to this generate task"),
        ("[fields]\nx = 3", "'fields' entry 'x' must be a text"),
    ],
)
def test_what_the_reader_refuses_of_generation(read, text, message):
    read(GENERATE)
    with pytest.raises(InputError) as refused:
        read(GENERATE + text)
    assert message in str(refused.value)


def test_prompts_in_a_list_are_of_multiple_choice(read):
    with pytest.raises(InputError, match="'prompt' is a list; only a multiple_choice"):
        read(GENERATE.replace('"{q}"', '["{q}"]'))


def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(InputError, match="nowhere.toml cannot be read"):
        select([str(tmp_path / "nowhere.toml")])
    with pytest.raises(InputError, match="is no JSON object"):
        read("[]", "list.json")
    read(CHOICE.replace('"mine"', '"piqa"'))
    with pytest.raises(InputError, match="the name 'piqa' is taken"):
        select([str(tmp_path / "mine.toml")])
