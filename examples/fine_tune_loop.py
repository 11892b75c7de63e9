"""Fine-tune a sparse export in a loop of your own: python examples/fine_tune_loop.py EXPORT DATA.jsonl OUTPUT

DATA.jsonl has a prompt and a completion in each line; the loss is that of the completions. The model keeps its links.
"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse
from hf_chts.fine_tuning import tuned_config

STEPS, BATCH, RATE = 60, 8, 1e-3

source, data, output = sys.argv[1:]
model = load_sparse(source, sparsity=tuned_config(SparsityConfig.load(source)), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokens(row):
    prompt, completion = (tokenizer(row[name], add_special_tokens=False).input_ids for name in ("prompt", "completion"))
    completion.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


rows = load_dataset("json", data_files=data, split="train")
rows = rows.map(tokens, remove_columns=rows.column_names)
batches = DataLoader(rows, BATCH, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
sparse = SparsityHandle.of(model)
evolver = sparse.evolver(optimizer, max_steps=STEPS)  # method static: links stay, and missing ones stay 0
step = 0
while step < STEPS:
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        evolver.step()
        step += 1
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
        if step == STEPS:
            break
evolver.close()
export_sparse(model, output, tokenizer=tokenizer, training={"fine-tuned from": source})
