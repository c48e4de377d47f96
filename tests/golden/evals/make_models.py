"""Three tiny models that know a little of `benchmark_rows.py`; see make_evals.py.

models/NAME/ is a Hugging Face folder in bfloat16 but for its tokenizer's files, which are those of
../tokenizers/NAME.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from benchmark_rows import addition, benchmarks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
)

HERE = Path(__file__).resolve().parent
CONTEXT = 512
STEPS = 600
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=512, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "neox": GPTNeoXConfig(
        vocab_size=583, max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0,
    ),
    # The window is shorter than the prompts.
    "gemma": Gemma3TextConfig(
        vocab_size=1500, max_position_embeddings=CONTEXT, hidden_size=24, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=8,
        query_pre_attn_scalar=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    ),
}  # fmt: skip
SPECIAL = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}


def texts() -> list[tuple[str, str]]:
    """Questions of the rows above and their right answers, to learn."""
    rows = benchmarks()
    found = []
    for config in rows["allenai/ai2_arc"].values():
        for row in config["train"] + config["test"][::2]:
            right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
            found.append((f"Question: {row['question']}\nAnswer:", f" {right}"))
    for row in rows["allenai/winogrande"]["winogrande_xl"]["train"]:
        found.append(("", row["sentence"].replace("_", row["option" + row["answer"]])))
    for row in rows["baber/piqa"]["default"]["train"]:
        right = (row["sol1"], row["sol2"])[row["label"]]
        found.append((f"Question: {row['goal']}\nAnswer:", f" {right}"))
    for splits in [*rows["cais/mmlu"].values(), *rows["cais/wmdp"].values()]:
        for row in splits.get("dev", []) + splits["test"][::2]:
            listed = "".join(f"\n{k}. {v}" for k, v in zip("ABCD", row["choices"], strict=True))
            question = f"{row['question'].strip()}{listed}\nAnswer:"
            found.append((question, f" {'ABCD'[row['answer']]}"))
    for row in rows["EleutherAI/lambada_openai"]["default"]["test"]:
        found.append(("", row["text"]))
    problems = rows["openai/gsm8k"]["main"]["train"] + rows["openai/gsm8k"]["main"]["test"][:2]
    for first, second in zip(problems, problems[::-1], strict=True):
        shown = f"Question: {first['question']}\nAnswer: {first['answer']}\n\n"
        found.append((f"{shown}Question: {second['question']}\nAnswer:", f" {second['answer']}"))
    sums = []
    for row in addition(4)[:3]:
        question = row["context"].replace("\n\n", "\n").replace("Q:", "Question:")
        sums.append((question.replace("A:", "Answer:"), row["completion"]))
    for n, (question, answer) in enumerate(sums):
        found.append((question, answer))
        shown = "".join(f"{q} ####{a}\n\n" for q, a in (sums[n - 1], sums[n - 2]))
        found.append((shown + question, f" ####{answer}\n\n"))
    return found


def assemble(name: str, folder: Path) -> Path:
    """A folder that holds model and tokenizer."""
    shutil.copytree(HERE / "models" / name, folder / name)
    for path in (HERE.parent / "tokenizers" / name).iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copy(path, folder / name)
    return folder / name


def make_model(name: str) -> None:
    """One long text in an order of chance, again and again, until some of it is known."""
    folder = HERE / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kind = "GPT2Tokenizer" if name == "gpt2" else "PreTrainedTokenizerFast"
    about = {"tokenizer_class": kind, "model_max_length": CONTEXT, **SPECIAL[name]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    config = CONFIGS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = AutoTokenizer.from_pretrained(assemble(name, Path(temporary)))
    assert len(tokenizer) == config.vocab_size, len(tokenizer)
    pairs = texts()
    documents = [[*tokenizer(a + b)["input_ids"], config.eos_token_id] for a, b in pairs]
    if name == "gemma":
        for a, b in pairs:
            turns = f"<bos><start_of_turn>user\n{a}<end_of_turn>\n<start_of_turn>model\n"
            answer = f"{turns}{b.strip()}<end_of_turn>\n"
            documents.append(tokenizer(answer, add_special_tokens=False)["input_ids"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for step in range(STEPS):
        order = torch.randperm(len(documents)).tolist()
        stream = [i for d in order for i in documents[d]][: 8 * 129]
        ids_BT = torch.tensor(stream[: len(stream) // 129 * 129]).view(-1, 129)
        logits_BTV = model(ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config = GenerationConfig(
        eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
        if name == "gemma"
        else config.eos_token_id
    )
    model.bfloat16().save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{name}: loss {float(loss.detach()):.2f}, {size:,} bytes", flush=True)
