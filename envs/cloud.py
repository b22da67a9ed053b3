"""A cloud account as JSON: random calls to S3 and DynamoDB, mocked by the package moto.

    pip install "moto[s3,dynamodb]"
    python -m envs.cloud --out cloud.jsonl.gz --episodes 300 --seed 0
    python train.py --data cloud.jsonl.gz

Claim: x is what the API showed before the call z, y what it showed after it. Every call is
recorded, failed ones too. A seed gives the same file again, with the same moto and boto3.

A state is JSON. The API's own list and get calls tell all of it except the last reply. A y:

    {
      "buckets": [
        "media"                          z was delete_bucket Bucket=media
      ],
      "items": {                         table / id / attribute
        "users/ann/city": "oslo"
      },
      "objects": {                       bucket / key
        "media/a.txt": "hello"
      },
      "reply": {                         to the last call; get_object adds the Body
        "Code": "BucketNotEmpty",
        "status": 409
      },
      "tags": {}                         bucket / tag
    }

Notes:
  1. The API nests a key in its bucket. Here each line names its owner, because Q reads only the
     lines that change.
  2. Request ids, dates, checksums and messages are left out.
  3. A call can succeed without any effect: delete_object of a missing key does. So y may equal x.
  4. put_item refuses an id that is there; put_object and update_item overwrite.
  5. An account begins with two buckets, a table and some more calls that are not recorded.
"""

import argparse
import json
import random

import tqdm

from envs import official, records
from envs.records import BadData

BUCKETS = ("media", "backup", "drafts", "reports")
KEYS = ("a.txt", "b.txt", "plan.md", "photo.png", "notes.md")
BODIES = ("hello", "draft", "final", "empty", "secret")
TAGS = {"team": ("red", "blue", "green"), "stage": ("test", "live")}
IDS = ("ann", "bob", "eva", "leo")
ITEM = {"city": ("oslo", "rome", "lima"), "color": ("red", "blue", "gold")}
CARE = 0.9  # chance that a call looks at what is there
BEFORE = 6  # random calls before the first that is recorded
WEIGHTS = (2, 1, 5, 2, 2, 2, 2, 1, 2, 2, 2)  # how often each call of `draw` is made


class Account:
    """A fresh account of the mock with the table users, and the reply to the last call."""

    def __init__(self, boto3):
        # A bucket's name in the host would clash with some names of services
        config = boto3.session.Config(s3={"addressing_style": "path"})
        session = boto3.session.Session("mock", "mock", region_name="us-east-1")
        self.s3 = session.client("s3", config=config)
        # This client takes plain Python values
        self.db = session.resource("dynamodb").meta.client
        self.errors = (self.s3.exceptions.ClientError, self.db.exceptions.ClientError)
        self.call("create_table", {
            "TableName": "users", "BillingMode": "PAY_PER_REQUEST",
            "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}]})

    def call(self, name, given):
        """Makes the call and keeps its reply. Returns the call as text."""
        service = self.s3 if hasattr(self.s3, name) else self.db
        try:
            answer = getattr(service, name)(**given)
            told = {"Body": answer["Body"].read().decode()} if "Body" in answer else {}
        except self.errors as error:
            answer = error.response
            told = {k: v for k, v in answer["Error"].items() if k in ("Code", "BucketName", "Key")}
        self.reply = {"status": answer["ResponseMetadata"]["HTTPStatusCode"], **told}
        if name == "delete_bucket" and not told:
            # moto would give its tags to the next bucket of that name; S3 does not
            self.s3.create_bucket(**given)
            self.s3.delete_bucket_tagging(**given)
            self.s3.delete_bucket(**given)
        return " ".join([name, *(f"{key}={spell(value)}" for key, value in given.items())])

    def state(self):
        """All that the account holds, and the last reply."""
        buckets, objects, tags, items = [], {}, {}, {}
        for bucket in self.s3.list_buckets()["Buckets"]:
            bucket = bucket["Name"]
            buckets.append(bucket)
            for found in self.s3.list_objects_v2(Bucket=bucket).get("Contents", []):
                answer = self.s3.get_object(Bucket=bucket, Key=found["Key"])
                objects[f"{bucket}/{found['Key']}"] = answer["Body"].read().decode()
            try:
                for tag in self.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]:
                    tags[f"{bucket}/{tag['Key']}"] = tag["Value"]
            except self.errors:  # it has none
                continue
        for item in self.db.scan(TableName="users")["Items"]:
            items |= {f"users/{item['id']}/{name}": item[name] for name in item if name != "id"}
        return {"buckets": sorted(buckets), "items": items, "objects": objects,
                "reply": self.reply, "tags": tags}


def spell(value):
    return value if isinstance(value, str) and " " not in value else json.dumps(value)


def show(state):
    return json.dumps(state, indent=2, sort_keys=True)


def draw(rng, state):
    """(name, arguments) of a random call. Most calls fit what is there."""

    def pick(there, names):
        return rng.choice(sorted(there) if there and rng.random() < CARE else names)

    bucket, key = pick(state["buckets"], BUCKETS), rng.choice(KEYS)
    source = pick(state["objects"], [f"{bucket}/{key}"])
    there = dict(zip(("Bucket", "Key"), source.split("/")))
    user = {"id": pick({name.split("/")[1] for name in state["items"]}, IDS)}
    item = {"id": rng.choice(IDS), **{name: rng.choice(words) for name, words in ITEM.items()}}
    name, tag = rng.choice(list(ITEM)), rng.choice(list(TAGS))
    tagged = pick({name.split("/")[0] for name in state["tags"]}, BUCKETS)
    calls = [
        ("create_bucket", {"Bucket": pick(set(BUCKETS) - set(state["buckets"]), BUCKETS)}),
        ("delete_bucket", {"Bucket": bucket}),
        ("put_object", {"Bucket": bucket, "Key": key, "Body": rng.choice(BODIES)}),
        ("copy_object", {"CopySource": source, "Bucket": bucket, "Key": key}),
        ("get_object", there),
        ("delete_object", there),
        ("put_bucket_tagging", {"Bucket": bucket, "Tagging": {
            "TagSet": [{"Key": tag, "Value": rng.choice(TAGS[tag])}]}}),
        ("delete_bucket_tagging", {"Bucket": tagged}),
        ("put_item", {"TableName": "users", "Item": item,
                      "ConditionExpression": "attribute_not_exists(id)"}),
        ("update_item", {"TableName": "users", "Key": user,
                         "UpdateExpression": f"SET {name} = :v",
                         "ExpressionAttributeValues": {":v": item[name]}}),
        ("delete_item", {"TableName": "users", "Key": user}),
    ]
    return rng.choices(calls, WEIGHTS)[0]


def episode(rng, boto3):
    """[(x, z, y)] of 8 to 12 calls."""
    account, steps = Account(boto3), []
    for bucket in rng.sample(BUCKETS, 2):
        account.call("create_bucket", {"Bucket": bucket})
    state = account.state()
    for _ in range(BEFORE + rng.randint(8, 12)):
        x, z, state = show(state), account.call(*draw(rng, state)), account.state()
        steps.append((x, z, show(state)))
    return steps[BEFORE:]


def make(args, broken, counts):
    """Yields the transitions of all episodes; see official.main."""
    try:
        import boto3
        import moto
    except ImportError as error:
        raise BadData(
            f'the package {error.name} is missing; pip install "moto[s3,dynamodb]"'
        ) from None
    for i in tqdm.trange(args.episodes, unit=" episodes"):
        name, rng = f"cloud{i:04d}", random.Random(f"{args.seed} {i}")
        with moto.mock_aws():
            steps = episode(rng, boto3)
        for t, (x, z, y) in enumerate(steps):
            counts["calls that failed"] += '"Code": ' in y
            yield records.Transition(name, t, x, z, y)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m envs.cloud", description="Record calls to a mock of AWS."
    )
    parser.add_argument("--episodes", type=int, default=300, help="episodes in all [300]")
    parser.add_argument("--seed", type=int, default=0, help="of accounts and calls [0]")
    return official.main(parser, make, argv)


if __name__ == "__main__":
    raise SystemExit(main())
