"""A run of the pixels world in the official formats of the three visual benchmarks, so that their
scorers read it as they read the real ones.

    python -m evals.export --run runs/pixels-tiny-0 --out exported
    python -m evals.aurora --data exported/aurora/test.json \\
        --generated exported/aurora/generated --tasks all --embedder pixels
    python -m evals.bytemorph --data exported/bytemorph/test.jsonl \\
        --generated exported/bytemorph/generated --embedder pixels
    python -m evals.worldprediction --data exported/worldprediction/pp.json \\
        --frames exported/worldprediction --generated exported/worldprediction/generated \\
        --embedder pixels

Claim: every test transition of the run is in AURORA's form (its kinds of edits) or in ByteMorph's
(its kinds of motion), every test episode of six steps or more in WorldPrediction's. Each comes
with P's prediction: from the true x or, in WorldPrediction, from its own last picture.

Departures from the benchmarks
1. Tasks are this world's kinds (add, remove, recolour, put, rotate), none of AURORA's five: give
   the scorer --tasks all.
2. ByteMorph's captions are left out: nobody describes these pictures. The two scores of texts stay
   empty.
3. WorldPrediction has one candidate a sample, the true one: its other candidates are for choosing
   among plans, which is not scored here.
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from envs import codebook, images, pixels, records

T = 6


def write_image(path, frame):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path)


def write_edits(rows, out, prefix=""):
    """The pictures that AURORA and ByteMorph both want, of rows [(x, z, y, y_hat)], pictures
    except z: images/ and generated/fullset/KIND/. Yields (name, kind, z, path of x, path of y), the
    paths from `out`."""
    for i, (x, z, y, y_hat) in enumerate(rows):
        name, kind = f"{prefix}{i:05d}", pixels.kind(z)
        paths = [f"images/{side}-{name}.png" for side in ("x", "y")]
        for path, frame in zip([*paths, f"generated/fullset/{kind}/{name}.png"], (x, y, y_hat)):
            write_image(out / path, frame)
        yield name, kind, z, *paths


def write_aurora(rows, out):
    """test.json and the pictures of `write_edits`."""
    table = [
        {"task": kind, "input": x, "output": y, "instruction": z}
        for _, kind, z, x, y in write_edits(rows, out, "aurora_")
    ]
    (out / "test.json").write_text(json.dumps(table, indent=1))


def write_bytemorph(rows, out):
    """test.jsonl and the pictures of `write_edits`."""
    table = [
        {
            "edit_type": kind,
            "image_id": name,
            "src_img": x,
            "tgt_img": y,
            "edit_prompt": z,
            "edit_prompt_rewrite_instruction": z,
        }
        for name, kind, z, x, y in write_edits(rows, out)
    ]
    (out / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def write_worldprediction(episodes, out):
    """episodes: [([z], [frame 0..T], [y_hat 1..T])]. pp.json, frames/ (a frame for the beginning of
    each segment and one for the end of the last) and generated/UID/."""
    table = {}
    for i, (zs, truth, y_hats) in enumerate(episodes):
        uid = f"episode-{i:03d}"
        segments = [f"{uid}-{k + 1}" for k in range(len(zs))]
        for name, frame in zip([*segments, segments[-1] + "@end"], truth):
            write_image(out / "frames" / f"{name}.png", frame)
        paths = [f"candidate_00/step_{k + 1:02d}.png" for k in range(len(zs))]
        for path, frame in zip(paths, y_hats):
            write_image(out / "generated" / uid / path, frame)
        (out / "generated" / uid / "metadata.json").write_text(
            json.dumps(
                {
                    "dataset": "pixels",
                    "sample_uid": uid,
                    "ground_truth_index": 0,
                    "candidates": [
                        {"index": 0, "actions": zs, "segments": segments, "generated_paths": paths}
                    ],
                }
            )
        )
        table[uid] = {
            "states": {"segment_uid": uid},
            "ground_truth": 1,
            "candidates": [segments],
            "action_segments": {
                s: {"action_label": z, "action_uid": s} for s, z in zip(segments, zs)
            },
            "original_segments": [
                {"segment_uid": s, "action_label": z} for s, z in zip(segments, zs)
            ],
        }
    (out / "pp.json").write_text(json.dumps({"pixels": table}, indent=1))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, metavar="DIR", help="folder that train.py --env pixels wrote"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.error = records.fail
    args = parser.parse_args(argv)
    out, new = Path(args.out), Path(f"{args.out}.{os.getpid()}.unfinished")
    try:
        if out.exists():
            raise records.BadData(f"--out {args.out}: is there already; name a new folder")
        from support import rollouts
        from support.opened import open_run
        run = open_run(args.run)
        if not images.is_image(run.test[0][0]):
            raise records.BadData(
                f"--run {args.run}: its states are texts; give a run of --env pixels"
            )
        frames = lambda states: images.frames(codebook(run.cfg), states)
        xs, zs, ys = zip(*run.test)
        rows = list(zip(frames(xs), zs, frames(ys), frames(run.P.predict(xs, zs))))
        steps = rollouts.windows(run.episodes, T)
        y_hat = rollouts.rollout(run.P.predict, steps, T)
        episodes = [
            (
                [z for _, z, _ in window],
                frames([window[0][0], *(y for _, _, y in window)]),
                frames([row[i] for row in y_hat]),
            )
            for i, window in enumerate(steps)
        ]
        motion = [row for row in rows if pixels.kind(row[1]) in pixels.MOTION]
        for write, some, name in (
            (
                write_aurora,
                [row for row in rows if pixels.kind(row[1]) not in pixels.MOTION],
                "aurora",
            ),
            (write_bytemorph, motion, "bytemorph"),
            (write_worldprediction, episodes, "worldprediction"),
        ):
            (new / name).mkdir(parents=True)
            write(some, new / name)
            print(f"{out / name}: {len(some)}")
        # whole or not at all
        os.replace(new, out)
    except (records.BadData, ImportError, OSError) as error:
        records.fail(error)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
