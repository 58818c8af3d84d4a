"""`rq-ep tiny-model`: train the tiny model, or keep the one that is there."""

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoint directory; its text goes to DIR/text")
    parser.add_argument(
        "--family",
        default="qwen3_moe",
        metavar="NAME",
        help="qwen3_moe, olmoe, mixtral, deepseek_v2, deepseek_v3, gpt_oss or switch_transformers",
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="training steps of 512 bytes each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same model on the same machine")


def run(args: argparse.Namespace) -> None:
    from rq_ep.model.tiny_recipe import TrainingRecipe

    recipe = TrainingRecipe(family=args.family, steps=args.steps, seed=args.seed)

    from rq_ep.commands.common import quiet_libraries
    from rq_ep.commands.progress_bar import progress_bar
    from rq_ep.model.tiny import tiny_model

    quiet_libraries()
    with progress_bar("{task.fields[loss]}", "{task.fields[speed]}") as bar:
        task = bar.add_task("training", total=recipe.steps, loss="", speed="")

        def show(step: int, steps: int, loss: float, tokens: int) -> None:
            elapsed_s = bar.tasks[task].elapsed or 0
            speed = f"{tokens / elapsed_s:,.0f} bytes/s" if elapsed_s else ""
            bar.update(task, completed=step, loss=f"loss {loss:.2f} nats/byte", speed=speed)

        trained = tiny_model(args.out, recipe, show)
        bar.update(task, visible=trained)
    print(f"{args.out}: {'trained' if trained else 'reused, it holds the same recipe'}")
    print(f"text to calibrate on: {args.out}/text/train; held out: {args.out}/text/held-out")
