"""QAT:   quantailor train ./model --scheme w2a16-g32 --data train.txt --out ./model-w2"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from quantailor.cli import lora as a
from quantailor.cli import options as o
from quantailor.cli.console import progress


def train(
    model: o.ModelArgument,
    data: Annotated[Path, typer.Option(help="text, JSONL or data set folder to train on", show_default=False)],
    out: o.OutOption,
    scheme: Annotated[
        str | None,
        typer.Option(help="what to train for; `float` is a plain fine-tune; leave out for a quantized model"),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="instead of --scheme, one after the other, each from the weights of the one before: 8,4,2 are "
            "weight bits (w8a16-g32, ...), or schemes; a gradient may follow, as in 4,1.58:bitnet"
        ),
    ] = None,
    stage_steps: Annotated[
        str | None, typer.Option(help="of each stage, as 100,100,200; an empty place is --steps, else the table's")
    ] = None,
    stage_rates: Annotated[str | None, typer.Option(help="learning rates of the stages, likewise")] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="random weights of the model's config, drawn by --seed")
    ] = False,
    eval_data: Annotated[
        Path | None, typer.Option(help="chooses the best iterate; by default a tenth of --data")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="by default from the table by bits", min=1)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="passes over --data in place of --steps: 1 or 2 behind PTQ is a usual hybrid")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="of the weights; by default from the table by bits and size")
    ] = None,
    scale_learning_rate: Annotated[float | None, typer.Option(help="of the logarithms of the scales")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    accumulate: Annotated[int, typer.Option(help="batches a step", min=1)] = 1,
    teacher: Annotated[str, typer.Option(help="`self` (the float model), `none`, or a model folder")] = "self",
    task_weight: Annotated[
        float, typer.Option(help="weight of the task's own loss beside the KL to the teacher", min=0)
    ] = 0.0,
    divergence: Annotated[
        str, typer.Option(help="from the teacher's logits: kl, cakld (KL both ways, by its confidence), jsd")
    ] = "kl",
    temperature: Annotated[float, typer.Option(help="of both models' logits")] = 1.0,
    hidden_weight: Annotated[
        float, typer.Option(help="of the squared difference of hidden states from the teacher's", min=0)
    ] = 0.0,
    attention_weight: Annotated[
        float, typer.Option(help="of the squared difference of attention scores before softmax", min=0)
    ] = 0.0,
    trains: Annotated[
        str,
        typer.Option(
            help="`all`; `scales`: integers stay as PTQ left them, and the optimizer is tiny; `ranges`: only the "
            "scales of static inputs trains"
        ),
    ] = "all",
    train_only: Annotated[
        list[str] | None,
        typer.Option(help="pattern of layers that train, such as '*.down_proj'; all others stay as PTQ left them"),
    ] = None,
    gradient: Annotated[
        str,
        typer.Option(
            help="lsq, lsq+ (learned zero points), ste, pact; bitnet (ternary), xnor or binaryconnect (binary)"
        ),
    ] = "lsq",
    blend: Annotated[
        float | None,
        typer.Option(help="share of the run in which quantization comes in; 0.5 with bitnet, else 0", min=0, max=1),
    ] = None,
    cage: Annotated[float, typer.Option(help="strength of the pull towards the grid", min=0)] = 0.0,
    average: Annotated[
        float, typer.Option(help="share of the run over which weights are averaged; 0 is no average", min=0, max=1)
    ] = 0.0,
    layer_decay: Annotated[float, typer.Option(help="of the learning rate, a block downwards")] = 1.0,
    freeze_lower: Annotated[float, typer.Option(help="share of the blocks, from below, that does not train")] = 0.0,
    freeze_ranges: Annotated[
        float | None, typer.Option(help="share of the run after which static input ranges stay")
    ] = None,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="rows of about one length share a batch, so little is padded")
    ] = False,
    dropout: Annotated[
        bool | None,
        typer.Option(
            "--dropout/--no-dropout", help="drop units as the model does; by default where no teacher is asked"
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 (mixed)")] = "float32",
    backward: Annotated[
        str, typer.Option(help="what integer layers multiply gradients in: auto, bfloat16 or float32")
    ] = "auto",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw-8bit")] = "adamw",
    parallel: Annotated[str, typer.Option(help="under torchrun: ddp or fsdp2")] = "ddp",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="one thread, repeatable kernels")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="steps", min=1)] = 25,
    record: Annotated[
        bool,
        typer.Option("--record", help="keep recording.jsonl in --out: errors, clipping, flips, drift, ranges by layer"),
    ] = False,
    record_every: Annotated[int | None, typer.Option(help="steps between measures; by default 10", min=1)] = None,
    on_alarm: Annotated[
        str,
        typer.Option(help="warn, act (lower the rate, or go back to the best iterate) or stop; all but warn record"),
    ] = "warn",
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="end early, repeatable: patience=3, error-stable=0.1%, overfit=2, minutes=30, tokens=1e6, steps=500"
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="end at a goal: 'recovery>=0.5', 'loss<=1.2', 'perplexity<=9', 'accuracy>=0.9'")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="folder for event files of what is recorded; needs the extra `tensorboard`")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="PTQ method to start from, as in `quantize`; by default what suits the scheme")
    ] = None,
    samples: o.SamplesOption = 128,
    context: o.ContextOption = 256,
    rule: o.RuleOption = None,
    point: o.PointOption = None,
    no_ragged: o.NoRaggedOption = False,
    lora: a.RankOption = None,
    lora_alpha: a.AlphaOption = None,
    lora_dropout: a.DropoutOption = None,
    lora_targets: a.TargetsOption = None,
    lora_base_bits: a.BaseBitsOption = None,
    lora_init: a.InitOption = None,
    lora_beside: a.BesideOption = False,
    lora_scales: a.ScalesOption = False,
    adapter_out: a.AdapterOutOption = None,
    base_out: a.BaseOutOption = None,
    format: o.FormatOption = None,
    seed: o.SeedOption = 0,
    overwrite: o.OverwriteOption = False,
    json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Train with the quantization in the loop; the result is never worse than the PTQ it starts from.

    After a kill, or Ctrl-C, the same command goes on behind the last checkpoint. Under `torchrun` the processes share
    each batch.

    Example:  quantailor train ./model --scheme w2a16-g32 --data train.txt --out ./model-w2 --steps 400

    Watched, and ended when it is good enough:
    quantailor train ./model --scheme w2a16-g32 --data train.txt --out ./model-w2 --record --stop patience=3

    A ladder of bits, and ternary weights that come in over half of the run:
    quantailor train ./model --stages 8,4,2 --stage-steps 50,100,200 --data train.txt --out ./model-w2
    quantailor train ./model --scheme w1.58a8 --gradient bitnet --data train.txt --out ./model-b158

    A bare encoder gets a head for the labels in the data:
    quantailor train ./encoder --scheme float --data train.jsonl --out ./classifier

    With --lora only a low-rank adapter trains, inside the rounding, on a base that stays packed; OUT is the merged
    model, with the integers that were trained:
    quantailor train ./model-w4 --lora 16 --teacher ./model --data train.txt --out ./tuned --adapter-out ./adapter
    """
    from quantailor import api
    from quantailor.cost.size import weight_file_bytes
    from quantailor.errors import UsageError
    from quantailor.ptq import distributed
    from quantailor.qat.stages import parse_stages
    from quantailor.store.publish import check_out
    from quantailor.verbs.training import train_folder

    inputs = [p for p in (model, data, eval_data) if p is not None]
    for place in (out, *(p for p in (adapter_out, base_out) if p is not None)):
        check_out(place, overwrite=overwrite, inputs=inputs)
    is_float = not (model / "quantailor.json").exists()
    options = (lora, lora_alpha, lora_dropout, lora_targets, lora_base_bits, lora_init, lora_beside, lora_scales)
    adapter = a.lora_of(*options, adapter_out, base_out, is_float)
    o.check_format(format)
    if stages is None and (stage_steps or stage_rates):
        raise UsageError("--stage-steps and --stage-rates belong to --stages, which is not given; name the stages")
    chain = [] if stages is None else parse_stages(stages, stage_steps, stage_rates)
    settings = api.Settings(
        steps=steps,
        learning_rate=learning_rate,
        scale_learning_rate=scale_learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        task_weight=task_weight,
        epochs=epochs,
        trains=trains,
        train_only=tuple(train_only or ()),
        gradient=gradient,
        blend=blend,
        divergence=divergence,
        temperature=temperature,
        hidden_weight=hidden_weight,
        attention_weight=attention_weight,
        cage=cage,
        average=average,
        layer_decay=layer_decay,
        freeze_lower=freeze_lower,
        freeze_ranges=freeze_ranges,
        group_by_length=group_by_length,
        dropout=dropout,
        precision=precision,
        backward=backward,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        parallel=parallel,
        deterministic=deterministic,
        checkpoint_every=checkpoint_every,
        record=record or record_every is not None,
        record_every=record_every,
        on_alarm=on_alarm,
        stop=tuple(stop or ()),
        until=until,
        seed=seed,
    )
    joined = distributed.join()
    try:
        trained = train_folder(
            model,
            data,
            out,
            overwrite=overwrite,
            format=format,
            inputs=inputs,
            adapter_out=adapter_out,
            base_out=base_out,
            lora=adapter,
            scheme=scheme,
            stages=chain,
            from_scratch=from_scratch,
            eval_data=eval_data,
            teacher=None if teacher == "none" else teacher,
            settings=settings,
            method=method,
            samples=samples,
            context=context,
            rules=o.rules(rule),
            points=o.points(point),
            ragged=not no_ragged,
            progress=progress(quiet or distributed.rank() > 0),
            tensorboard=tensorboard,
        )
        if distributed.rank() > 0:
            return
    finally:
        if joined:
            distributed.leave()
    report = trained.training
    assert report is not None
    document = {
        "out": str(out),
        "scheme": str(trained.state.scheme) if trained.state else "float",
        "steps": report.steps,
        "best_step": report.best_step,
        "improved": report.improved,
        "start": list(report.start),
        "best": list(report.best),
        "learning_rate": report.learning_rate,
        "losses": [list(pair) for pair in report.losses],
        "optimizer_bytes": report.optimizer_bytes,
        "stopped": report.stopped,
        "alarms": [] if report.recording is None else [dataclasses.asdict(a) for a in report.recording.alarms],
        "size_bytes": weight_file_bytes(out),
        "notes": trained.notes,
        **({"stages": ladder} if (ladder := trained.details.get("stages")) else {}),
    }
    if adapter is not None:
        document["trainable"] = report.trainable
        document |= {n: str(p) for n, p in (("adapter_out", adapter_out), ("base_out", base_out)) if p is not None}
    text = (
        f"{document['scheme']}: score {report.start[0]:.4f} -> {report.best[0]:.4f} "
        f"(lower is better; best at step {report.best_step} of {report.steps}); "
        f"saved to {out}"
    )
    told = [
        f"stage {n}, {s['scheme']}: {float(s['start'][0]):.4f} -> {float(s['best'][0]):.4f}, {s['steps']} steps"
        for n, s in enumerate(ladder or [], 1)
    ]
    o.show(document, "\n".join([*told, text, *(f"note: {n}" for n in trained.notes)]), json)
