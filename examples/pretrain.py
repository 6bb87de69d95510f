"""Pretrain a small Llama on text, with checkpoints, evaluation and a sample: python examples/pretrain.py"""

import shardtrain as st
from shardtrain.data import split
from shardtrain.models.llama import Llama


def main(steps: int = 200, directory: str = "runs/pretrain") -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(fsdp=4, tensor=2).build(devices))
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 128, "vocab_size": 512}
    model = st.ModelDef(lambda rngs: Llama(**sizes, rngs=rngs))
    tx = st.optimizer("adamw", model.weights, lr=3e-3, weight_decay=0.1, clip_norm=1.0)
    step, eval_step = st.make_train_step(model, tx, place), st.make_eval_step(model, place)

    rows, tokenizer = st.open_source("corpus", seq_len=64, vocab_size=512, directory=f"{directory}/data")
    train, held_out = split(rows, 0.02)
    sharding, losses = place.sharding(("batch", "seq")), []
    with st.Checkpointer(f"{directory}/checkpoints") as checkpoints:
        state = st.init_state(model, tx, place, seed=0)
        saved = checkpoints.restore(state)  # None on the first start
        state = saved.state if saved else state
        position = saved.extra["data"] if saved else None
        with st.Loader(train, global_batch=16, seed=0, sharding=sharding, state=position) as batches:
            for number in range(int(state.step) + 1, steps + 1):
                state, metrics = step(state, next(batches))
                losses.append(float(metrics["loss"]))
                print(f"step {number}  loss {losses[-1]:.4f}")
                if number % 100 == 0 or number == steps:
                    checkpoints.save(number, state, {"data": batches.state})

    with st.Loader(held_out, global_batch=16, seed=0, sharding=sharding, shuffle=False, epochs=1) as batches:
        print("held out:", st.evaluate(eval_step, state, batches))
    prompt = tokenizer.encode("def ").tolist()
    print(tokenizer.decode(st.generate(model, state, place, prompt, tokens=32, window=64)[0]))
    return losses


if __name__ == "__main__":
    main()
