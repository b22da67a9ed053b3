"""A judge that looks at two images, and what the three visual scorers read in its replies.

Claim: whatever a reply holds, it gives numbers within the scale, or is counted as a miss with one
line that says why.

A judge is any judge(messages) -> text, with messages in the OpenAI chat format, that has a `.name`.

Notes:
  1. A number counts if it is a JSON or Python number, no boolean and no text, within the scale: a
     judge that leaves the scale did not understand it, so that is a miss. --released takes what the
     released scripts take: booleans and numbers outside the scale, and for AURORA 7.9 as 7, other
     items of the list skipped, a list on one line only; for WorldPrediction text such as "7". NaN
     and infinity, which make the released means NaN, are a miss either way.
  2. Replies are written as they come, with the model's name and a hash of the question (texts and
     pixels). The same command goes on where it was cut; --replies without --judge scores them
     again. A reply to another question under the same id (new images, a new prompt) is asked again,
     or is a miss; a line without a hash is taken at its word.
  3. Brackets are found in linear time, and literal_eval, which can exhaust the stack, reads at most
     2,000 characters.
  4. A judge may think aloud between <think> and </think>. Only what follows its thoughts counts,
     and thoughts without an end are a miss. --released reads the thoughts, too.
  5. A model that refuses `max_tokens` is asked again with `max_completion_tokens`, one that refuses
     a temperature without any. Any other refusal before the first answer ends the command.
"""
import ast
import base64
import hashlib
import http.client
import io
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
import warnings

from envs import records
from envs.official import need
from envs.records import BadData, fail

# What a request or its reply can raise
BROKEN = (
    OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError)
LONGEST = 2**22                 # bytes of an answer that are read
THOUGHTS = re.compile(r"[<◁](/?)(?:think|thinking|thought|reasoning)[>▷]", re.IGNORECASE)


def question(asked, images, system=None, jpeg=False, detail=None):
    """Messages: a text and pictures as PNG, or as JPEG of quality 100."""
    from PIL import Image
    content = [{"type": "text", "text": asked}]
    for image in images:
        file, kind = io.BytesIO(), "jpeg" if jpeg else "png"
        Image.fromarray(image).save(file, kind, **({"quality": 100} if jpeg else {}))
        url = {"url": f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"}
        content.append(
            {"type": "image_url", "image_url": url | ({"detail": detail} if detail else {})}
        )
    return [{"role": "system", "content": system}] * (system is not None) + [
        {"role": "user", "content": content}
    ]


class OpenAIJudge:
    """messages -> text by a model behind any OpenAI-compatible endpoint (OPENAI_API_KEY,
    OPENAI_BASE_URL), at temperature 0.

    BadData if it does not answer this question. A refusal before any answer ends the command.
    """

    def __init__(self, model, max_tokens=256, wait=1.0):
        self.name, self.wait, self.answered = model, wait, False
        self.how = {"temperature": 0, "max_tokens": max_tokens}
        self.base, self.key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
        if not self.key and not self.base:
            raise BadData(
                f"--judge {model}: set OPENAI_API_KEY (and OPENAI_BASE_URL for a server other than "
                "OpenAI's)"
            )
        self.base = (self.base or "https://api.openai.com/v1").rstrip("/")

    def __call__(self, messages):
        header = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        for attempt in range(4):
            time.sleep(self.wait * (2 ** attempt - 1))
            fatal = True
            try:
                body = {"model": self.name, "messages": messages} | self.how
                request = urllib.request.Request(
                    self.base + "/chat/completions", json.dumps(body).encode(), header
                )
                with urllib.request.urlopen(request, timeout=120) as answer:
                    answer = json.loads(answer.read(LONGEST))
                reply = answer["choices"][0]["message"]["content"]
                self.answered = True
                # a refusal has no content
                return reply if isinstance(reply, str) else ""
            except urllib.error.HTTPError as error:
                said = self.words(error)
                why, fatal = f"HTTP {error.code}: {said}", False
                if error.code in (400, 422) and self.adapt(said):
                    continue
                if error.code < 500 and error.code not in (408, 409, 429):
                    fatal = True
                    break
            except BROKEN as error:
                # not its text, which can hold the key
                why = type(error).__name__
        if fatal and not self.answered:
            fail(
                f"--judge {self.name}: {self.base} does not answer ({why}); check OPENAI_BASE_URL, "
                "OPENAI_API_KEY and the model"
            )
        raise BadData(f"{self.name} does not answer ({why})")

    def words(self, error):
        """What the server said with an error, without the key."""
        said = str(error.reason)
        try:
            said = error.read(LONGEST).decode("utf-8", "replace") or said
            said = str(json.loads(said)["error"]["message"])
        except BROKEN:
            pass
        said = said.replace(self.key, "***") if self.key else said
        return records.one_line(said)[:300]

    def adapt(self, said):
        """Note 5: change how the judge is asked; whether that may help."""
        if "max_tokens" in said and "max_tokens" in self.how:
            self.how["max_completion_tokens"] = self.how.pop("max_tokens")
        elif "temperature" in said and "temperature" in self.how:
            del self.how["temperature"]
            print(f"warning: {self.name} takes no temperature; it is asked without one",
                  file=sys.stderr)
        else:
            return False
        return True


class Recorded:
    """The replies in `file`, {"id", "reply"} a line; what is not there is asked of `judge`, if
    there is one, and written there.

    misses: a line for each reply that is missing or holds no score. copies: itself if the copy of x
    is judged too, else None.
    """

    def __init__(self, file, judge=None, copies=True):
        self.file, self.judge, self.copies, self.replies, self.misses = (
            file, judge, self if copies else None, {}, [])
        models, raw = set(), b"\n"
        for number, raw in records.lines(file) if judge is None or os.path.exists(file) else ():
            try:
                row = records.from_json(raw)
                self.replies[need(row, "id", str, file)] = (
                    need(row, "reply", str, file), row.get("asked"))
                models.add(records.one_line(row.get("model") or "unnamed"))
            # BadData is a ValueError
            except (ValueError, RecursionError):
                self.misses += (
                    [f'{file}:{number}: not {{"id": str, "reply": str}}; remove the line']
                    if raw.strip()
                    else []
                )
        if judge is not None and (file.endswith(".gz") or models - {judge.name}):
            raise BadData(
                f"--replies {file}: is gzipped, or holds replies of another judge than "
                f"{judge.name}; give another name"
            )
        self.torn, self.name = (
            not raw.endswith(b"\n"),
            judge.name if judge else ", ".join(sorted(models)) + " (recorded)")

    def __call__(self, parse, id, asked, images, **how):
        """What `parse` makes of the reply, or None."""
        pixels = b"".join(str(image.shape).encode() + image.tobytes() for image in images)
        digest = hashlib.sha256(
            json.dumps([how.get("system"), asked]).encode() + pixels
        ).hexdigest()[:16]
        reply, of = self.replies.get(id, (None, None))
        try:
            if reply is None or of not in (None, digest):
                if self.judge is None:
                    raise BadData(
                        f"{self.file}: no reply "
                        f"{'to these images and this prompt ' if reply is not None else ''}"
                        f"with the id {id}"
                    )
                reply = self.judge(question(asked, images, **how))
                self._write(
                    json.dumps(
                        {"id": id, "reply": reply, "model": self.judge.name, "asked": digest}
                    )
                )
            found = parse(reply)
            if found is None:
                raise BadData(f"{id}: no score in the reply {json.dumps(reply)[:60]}")
            return found
        except BadData as error:
            self.misses.append(str(error))

    def _write(self, line):
        try:
            with open(self.file, "a") as file:
                # torn: the last run was cut inside a line
                file.write("\n" * self.torn + line + "\n")
            self.torn = False
        except OSError as error:
            fail(
                f"--replies {self.file}: cannot write it ({error.strerror}); name a file that you "
                "may write"
            )


def from_args(args, max_tokens):
    """A Recorded by --judge, --replies and --no-judge-copy, or None without them."""
    if args.judge and not args.replies:
        raise BadData(
            f"--judge {args.judge}: name the file that its replies are written to, --replies FILE"
        )
    judge = OpenAIJudge(args.judge, max_tokens) if args.judge else None
    return Recorded(args.replies, judge, not args.no_judge_copy) if args.replies else None


# ---- Parsers of replies --------------------------------------------------------------------------


def without_thoughts(reply, released):
    """The reply behind its thoughts, by note 4; "" if these have no end."""
    marks = [] if released else list(THOUGHTS.finditer(reply))
    if not marks:
        return reply
    return reply[marks[-1].end():] if marks[-1][1] else ""


def _score(value, top, released):
    """float(value) if it is a number in [0, top], else None; released: note 1."""
    if isinstance(value, bool) and not released or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and (released or 0 <= value <= top) else None


def _object(reply, start, end):
    """The JSON object in reply[start:end + 1], or {}."""
    try:
        return records.from_json(reply[start:end + 1]) if -1 < start < end else {}
    except ValueError:
        return {}


def aurora_scores(reply, released=False):
    """(success, overediting), each in [0, 10], of the first [...] of a reply; None if it holds no
    such two numbers."""
    reply = without_thoughts(reply, released)
    for part in reply.split("\n") if released else [reply]:
        start = part.find("[")
        end = part.find("]", start)
        if -1 < start < end:
            break
    else:
        return None
    if released:
        try:
            with warnings.catch_warnings():                # of odd syntax
                warnings.simplefilter("ignore")
                found = ast.literal_eval(part[start:end + 1][:2000])
            items = [int(x) for x in found if isinstance(x, (int, float))]
        except (SyntaxError, ValueError, TypeError, OverflowError, MemoryError, RecursionError):
            return None
    else:
        items = part[start + 1:end].split(",")
        items = [
            float(x)
            for x in items[:2]
            if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", x.strip(), re.ASCII)
        ]
    scores = [_score(x, 10, released) for x in items[:2]]
    return None if len(scores) < 2 or None in scores else tuple(scores)


def bytemorph_score(reply, released=False):
    """The number under "Score", in [0, 100], of the first {...} of a reply, which ends at its first
    }; or None."""
    reply = without_thoughts(reply, released)
    start = reply.find("{")
    return _score(_object(reply, start, reply.find("}", start)).get("Score"), 100, released)


def worldprediction_score(reply, released=False):
    """The number under "score", in [0, 10], of what stands between a reply's first { and its last
    }; or None."""
    reply = without_thoughts(reply, released)
    value = _object(reply, reply.find("{"), reply.rfind("}")).get("score")
    if released and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return _score(value, 10, released)
