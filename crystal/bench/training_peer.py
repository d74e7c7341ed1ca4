"""One trainer in one process for `crystal bench train`: builds its model, then takes training steps when asked.

Run as a file by the trainer's own Python, so at the top nothing but the standard library is imported. Reads lines
`run N` and `quit`; answers lines of JSON: {"ready": …} once it has taken two steps, then {"wall": …, "cpu": …} in
seconds of each step, the loss and the process' peak resident bytes. While it is not asked it waits, without spinning.

Every trainer has the same shape, tokens, AdamW and clipping: what differs is its model, its loss and how it computes
in bf16. All weights and moments are fp32.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time

LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0


def tokens(step, shape):
    """(ids, labels) of a step, int64 [batch, seq_len]: Zipf's law, a pure function of the step."""
    import numpy
    import torch

    ids = numpy.random.default_rng([1234, step]).zipf(1.2, size=(shape["batch"], shape["seq_len"] + 1))
    ids = torch.from_numpy((ids % shape["vocab_size"]).astype("int64"))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def crystal(shape, how):
    """Our cpu backend."""
    import torch

    from crystal.backends.base import MicroBatch, Setup
    from crystal.backends.config import CpuConfig, OptimizerConfig
    from crystal.backends.cpu import CpuBackend
    from crystal.bench.training import model_of

    config = model_of(shape)
    optimizer = OptimizerConfig(betas=BETAS, weight_decay=DECAY, grad_clip=CLIP)
    plan = optimizer.plan_for(config)
    settings = CpuConfig(dtype=how.dtype, threads=how.threads, compile=how.compile)
    backend = CpuBackend(Setup(config, plan, optimizer, lambda step: LR, 1, 1), settings)
    backend.initialise()
    count = shape["batch"] * shape["seq_len"]

    def step(number):
        ids, labels = tokens(number, shape)
        rows, weights = torch.zeros(len(ids), dtype=torch.int64), torch.full(ids.shape, 1 / count)
        return backend.train_step(number + 1, [MicroBatch(ids, labels, weights, rows, torch.zeros_like(ids))]).host()

    return lambda number: step(number)["loss"]


def _plain_loop(model, loss_of, shape, how):
    """A step of the usual ten lines: autocast, backward, clip, fused AdamW."""
    import torch

    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    run = torch.compile(model, dynamic=False) if how.compile else model

    def step(number):
        ids, labels = tokens(number, shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=how.dtype == "bf16"):
            loss = loss_of(run, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


def litgpt(shape, how):
    """litgpt's model and its chunked loss."""
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    model = GPT(
        Config(
            name="peer", n_layer=shape["n_layers"], n_head=shape["n_heads"], n_embd=shape["d_model"],
            vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"], block_size=shape["seq_len"],
            rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5,
            mlp_class_name="LLaMAMLP", intermediate_size=shape["d_ff"],
        )
    )  # fmt: skip
    return _plain_loop(model, lambda m, ids, labels: chunked_cross_entropy(m(ids), labels), shape, how)


def _llama(shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_heads"],
            num_key_value_heads=shape["n_heads"], max_position_embeddings=shape["seq_len"], use_cache=False,
            tie_word_embeddings=False, attn_implementation="sdpa",
        )
    ).train()  # fmt: skip


def transformers(shape, how):
    """transformers' LLaMA in a plain loop, which is faster than its Trainer and needs no accelerate."""
    return _plain_loop(
        _llama(shape), lambda m, ids, labels: m(input_ids=ids, labels=labels, shift_labels=labels).loss, shape, how
    )


def nanogpt(shape, how):
    """The shortest LLaMA in torch's own operators, logits and cross-entropy of a whole batch, in nanoGPT's loop."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    d, heads = shape["d_model"], shape["n_heads"]
    frequency = 10000.0 ** (-torch.arange(0, d // heads, 2) / (d // heads))
    angle = torch.outer(torch.arange(shape["seq_len"]), frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype).transpose(1, 2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.gate_up = nn.Linear(d, 2 * shape["d_ff"], bias=False)
            self.down = nn.Linear(shape["d_ff"], d, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, d // heads)).unbind(2)
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v.transpose(1, 2), is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    vocabulary = shape["vocab_size"]
    model = nn.Sequential(
        nn.Embedding(vocabulary, d), *(Block() for _ in range(shape["n_layers"])), nn.RMSNorm(d, eps=1e-5),
        nn.Linear(d, vocabulary, bias=False),
    )  # fmt: skip
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    return _plain_loop(model, lambda m, x, y: F.cross_entropy(m(x).float().flatten(0, 1), y.flatten()), shape, how)


def trainer(shape, how):
    """transformers' Trainer with accelerate, which owns its loop: `serve` is called from inside, between steps."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            number = 0
            while True:
                for ids, labels in zip(*tokens(number, shape), strict=True):
                    yield {"input_ids": ids, "labels": labels, "shift_labels": labels}
                number += 1

    class Turns(TrainerCallback):
        """Each step runs from one call to the next; the loop's own work between steps is part of it."""

        def on_step_begin(self, args, state, control, **_):
            self.asked.send(None)

        def on_log(self, args, state, control, logs=None, **_):
            self.loss = (logs or {}).get("loss", 0.0)

    def serve_inside(serve):
        turns = Turns()
        turns.loss = 0.0
        turns.asked = serve(lambda: turns.loss)
        arguments = TrainingArguments(
            output_dir="/tmp/crystal-bench-trainer", max_steps=10**6, per_device_train_batch_size=shape["batch"],  # noqa: S108
            learning_rate=LR, adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY, max_grad_norm=CLIP,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            bf16=how.dtype == "bf16", torch_compile=how.compile, dataloader_pin_memory=False, disable_tqdm=True,
            optim="adamw_torch_fused",
        )  # fmt: skip
        Trainer(model=_llama(shape), train_dataset=Rows(), args=arguments, callbacks=[turns]).train()

    return serve_inside


PROVIDERS = {f.__name__: f for f in (crystal, litgpt, transformers, trainer, nanogpt)}


def say(**line):
    sys.__stdout__.write(json.dumps(line) + "\n")
    sys.__stdout__.flush()


def serve(loss):
    """A coroutine that is sent to at the start of every step: times the steps, and between runs waits for commands."""
    yield  # the first step begins
    for _ in range(2):  # compilation, first allocations
        yield
    say(ready=True)
    for line in sys.stdin:
        if line.split()[0] == "quit":
            break
        wall, cpu = [], []
        for _ in range(int(line.split()[1])):
            begun = time.perf_counter(), time.process_time()
            yield
            wall.append(time.perf_counter() - begun[0])
            cpu.append(time.process_time() - begun[1])
        say(wall=wall, cpu=cpu, loss=loss(), peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    os._exit(0)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("provider", choices=PROVIDERS)
    arguments.add_argument("shape", type=json.loads)
    arguments.add_argument("--dtype", choices=["fp32", "bf16"], required=True)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--compile", action="store_true")
    how = arguments.parse_args()
    import torch

    torch.set_num_threads(how.threads)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        step = PROVIDERS[how.provider](how.shape, how)
        if how.provider == "trainer":
            step(serve)
            return
        last, number = [0.0], 0
        turns = serve(lambda: last[0])
        while True:
            turns.send(None)
            last[0] = step(number)
            number += 1


if __name__ == "__main__":
    main()
