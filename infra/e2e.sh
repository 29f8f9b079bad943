#!/usr/bin/env bash
# From empty machines to a served model, on this machine alone: a Ray cluster that asks for a token, an S3 server, and
# MLflow with authentication, on four hosts made of network namespaces.
#
#   desk                 where the user sits, who has this checkout; S3 (moto) and MLflow
#   head                 of Ray, without CPUs for ranks
#   worker-1, worker-2   one rank each
#
#   infra/e2e.sh [--short]     --short: train on two shards, and try every port without the token; no more
#
# Needs root, iproute2, util-linux, and an environment with the packages of `make test`: PYTHON names its interpreter, by
# default that of .venv. No internet. Each step prints its seconds; one that fails prints its output. Exit status: 0; 1, a
# step failed; 3, this machine lacks something, said in one line. All that was made is removed: processes, namespaces, files.
set -euo pipefail
# what is set for other clusters and servers is not for these hosts
for name in "${!RAY_@}" "${!MLFLOW_@}" "${!AWS_@}"; do unset "$name"; done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
if [ -z "${SIMMATCH_HOSTS:-}" ]; then
    "$python" -c 'import ray, mlflow, moto, s3fs, flask_wtf' 2>/dev/null ||
        { echo "error: expected $python to have the packages of make test; PYTHON names another interpreter" >&2; exit 3; }
    exec "$python" -m jobs.benchmarks.namespaces desk head worker-1 worker-2 -- "infra/${BASH_SOURCE[0]##*/}" "$@"
fi
case "${1:-}" in
    "") short=false ;;
    --short) short=true ;;
    *) echo "usage: infra/e2e.sh [--short]" >&2 && exit 2 ;;
esac

# --- hosts ------------------------------------------------------------------------------------------------------------

hosts=() limit_s=600 # longest wait, on a machine that may be busy
work=$(mktemp -d /tmp/e2e-XXXX) # short: Ray's sockets lie below it, and the path of a socket may have 107 characters
power_off() { # HOST
    local pid
    for pid in $(ip netns pids "${namespace[$1]}"); do
        kill -KILL "$pid" 2>/dev/null || true # it may have ended with another
    done
}

clean_up() {
    local host
    for host in "${hosts[@]}"; do power_off "$host"; done
    rm -rf "$work"
}

trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
declare -A address namespace started
while read -r name its_address its_namespace; do
    hosts+=("$name") address[$name]=$its_address namespace[$name]=$its_namespace
    mkdir -p "$work/hosts/$name"/{home,tmp}
done <<<"$SIMMATCH_HOSTS"
mkdir "$work/host"

on() { # HOST COMMAND...: run it there, with that host's name, home and temporary files
    local host=$1
    shift
    # shellcheck disable=SC2016  # for the inner shell
    ip netns exec "${namespace[$host]}" unshare --uts --mount sh -c \
        'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"' sh "$host" "$work/hosts/$host" "$work/host" \
        env HOME="$work/host/home" TMPDIR="$work/host/tmp" "$@"
}

start() { # HOST NAME COMMAND...: in the background, outside of the checkout, with its output in NAME.log
    local host=$1 name=$2
    shift 2
    (cd "$work" && on "$host" "$@") >"$work/$name.log" 2>&1 &
    started[$name]=$!
}

submit() { # NAME COMMAND...: in the background, from the desk, as a job of the cluster, with its output in NAME.log
    local name=$1
    shift
    { on desk "$python" -m jobs.submit --wait --submission-id "$name" -- "$@" && touch "$work/$name.ok"; } \
        >"$work/$name.log" 2>&1 &
    started[$name]=$!
}

# --- steps ------------------------------------------------------------------------------------------------------------

step() { # TEXT COMMAND...: run the command, say how long it took
    local text=$1 began=$EPOCHREALTIME
    shift
    "$@" >"$work/step" 2>&1 & # in the background: a signal ends the wait, not only the command
    if ! wait $!; then
        tail -n 50 "$work/step" >&2
        echo "failed: $text" >&2
        exit 1
    fi
    awk -v text="$text" -v began="$began" -v ended="$EPOCHREALTIME" \
        'BEGIN { printf "%6.1f s  %s\n", ended - began, text }'
}

wait_for() { # NAME COMMAND...: until the command succeeds, as long as what was started by that name runs
    local name=$1 limit=$((SECONDS + limit_s)) runs=true
    shift
    while $runs && [ "$SECONDS" -lt "$limit" ]; do
        kill -0 "${started[$name]}" 2>/dev/null || runs=false
        if "$@"; then return 0; fi
        sleep 0.5
    done
    tail -n 40 "$work/$name.log"
    if $runs; then echo "$name: not within $limit_s s: $*"; else echo "$name ended before: $*"; fi
    return 1
}

says() { grep -q -e "$2" "$work/$1.log"; } # NAME TEXT: whether it has printed that
succeeded() { [ -e "$work/$1.ok" ]; }      # NAME: of a job

# --- who may do what --------------------------------------------------------------------------------------------------

secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY PYTHONPATH RAY_ADDRESS RAY_AUTH_TOKEN
PATH=$(dirname "$python"):$PATH
secret >"$work/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token RAY_API_SERVER_ADDRESS=http://${address[head]}:8265
export AWS_ENDPOINT_URL=http://${address[desk]}:9000 AWS_DEFAULT_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
export MLFLOW_TRACKING_URI=http://${address[desk]}:5000 MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1
AWS_SECRET_ACCESS_KEY=$(secret) MLFLOW_TRACKING_PASSWORD=$(secret) admin_password=$(secret)
export AWS_ACCESS_KEY_ID=e2e AWS_SECRET_ACCESS_KEY MLFLOW_TRACKING_USERNAME=ada MLFLOW_TRACKING_PASSWORD

# --- servers ----------------------------------------------------------------------------------------------------------

bucket() {
    on desk "$python" -c 'import s3fs; s3fs.S3FileSystem().mkdir("e2e")'
}

user() { # of MLflow, who is not its administrator
    on desk env admin_password="$admin_password" "$python" - <<'PY'
import os, requests
user = {"username": os.environ["MLFLOW_TRACKING_USERNAME"], "password": os.environ["MLFLOW_TRACKING_PASSWORD"]}
url = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/users/create"
requests.post(url, json=user, auth=("admin", os.environ["admin_password"]), timeout=30).raise_for_status()
PY
}

nodes() { # COUNT [ADDRESS]: whether so many are alive; the id of the one with that address
    on desk "$python" - "$@" <<'PY'
import os, sys, requests
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
url = os.environ["RAY_API_SERVER_ADDRESS"] + "/nodes?view=summary"
answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
answer.raise_for_status()
alive = [each for node in answer.json()["data"]["summary"] if (each := node["raylet"])["state"] == "ALIVE"]
print(*(node["nodeId"] for node in alive if node["nodeManagerAddress"] in sys.argv[2:]))
sys.exit(len(alive) != int(sys.argv[1]))
PY
}

join() { # HOST COUNT OPTION...: a node joins, so that there are so many; Ray gives it 30 s, too few on a busy machine
    local host=$1 count=$2 _
    shift 2
    for _ in 1 2 3; do
        start "$host" "$host" ray start --block --disable-usage-stats --node-ip-address="${address[$host]}" \
            --object-store-memory=100000000 "$@"
        if wait_for "$host" nodes "$count"; then return 0; fi
        power_off "$host"
    done
    return 1
}

ports() { # of every host, without the token; of those with ranks first, while there are any
    local host pid pids=()
    for host in worker-1 worker-2 head desk; do
        { echo "$host:" && on "$host" env -u RAY_AUTH_TOKEN_PATH "$python" -m tests.ports; } >"$work/ports-$host" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || { cat "$work"/ports-* && return 1; }
    done
}

cat >"$work/mlflow.ini" <<INI
[mlflow]
default_permission = READ
database_uri = sqlite:///$work/host/users.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
start desk s3 "$python" -m moto.server -H "${address[desk]}" -p 9000
start desk mlflow env MLFLOW_AUTH_CONFIG_PATH="$work/mlflow.ini" MLFLOW_AUTH_ADMIN_PASSWORD="$admin_password" \
    MLFLOW_FLASK_SERVER_SECRET_KEY="$(secret)" MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    "$python" -m mlflow server --app-name basic-auth --host "${address[desk]}" --port 5000 --workers 1 \
    --allowed-hosts "${address[desk]}:5000" --backend-store-uri "sqlite:///$work/host/mlflow.db" \
    --artifacts-destination "$work/host/artifacts"
head=(--head --port=6379 --num-cpus=0 --dashboard-host="${address[head]}" --temp-dir="$work/host/ray")
worker=(--address="${address[head]}:6379" --num-cpus=1)

step "S3: a server, a bucket" wait_for s3 bucket
step "MLflow: a server that asks for a password, a user" wait_for mlflow user
step "Ray: a head that asks for a token" join head 1 "${head[@]}"
step "Ray: a worker" join worker-1 2 "${worker[@]}"
step "Ray: another" join worker-2 3 "${worker[@]}"

# --- a run ------------------------------------------------------------------------------------------------------------

checkpoints() { # COUNT: whether the run has committed so many, or more
    on desk "$python" - "$run_dir" "$1" <<'PY'
import sys, s3fs
sys.exit(len(s3fs.S3FileSystem().glob(sys.argv[1] + "/checkpoints/*/manifest.json")) < int(sys.argv[2]))
PY
}

run_dir=s3://e2e/runs/digits
run=(--config jobs/configs/digits.yaml --set model.layers.1.dynamics.exchange=gather_state --set log_every=20)
run+=(--set checkpoint.every_steps=100 --set probe.readout=ridge)
if $short; then
    # so long that it does not end by itself, on a machine of any speed
    submit train python -m jobs.pretrain "${run[@]}" --run-dir "$run_dir" --set model.layers.1.train.epochs=10000
    step "jobs.submit: two shards on two workers" wait_for train says train "^ranks: "
    step "every port without the token" ports
    sed 's/^/          /' "$work"/ports-*
    step "ray job stop" on desk ray job stop train
    step "the job ends with status 143" wait_for train says train "STOPPED, exit status 143"
    step "checkpoints in S3" checkpoints 1
    exit
fi

# --- the user's way ---------------------------------------------------------------------------------------------------

images() { # the 8 × 8 digits of scikit-learn as PNG files in three tar files
    on desk "$python" - <<'PY'
import io, os, s3fs
from PIL import Image
from sklearn.datasets import load_digits
from tests.own_images import write_tars
from pathlib import Path

def png(values):
    file = io.BytesIO()
    Image.fromarray((values * 15.9375).round().astype("uint8")).save(file, "PNG")
    return file.getvalue()

digits = load_digits()
items = [(f"{index:04d}", int(label), png(image)) for index, (image, label) in enumerate(zip(digits.images, digits.target))]
folder = write_tars(Path(os.environ["TMPDIR"]) / "images", items)
s3fs.S3FileSystem().put(f"{folder}/*.tar", "s3://e2e/images/")
PY
}

drain() { # HOST: what a cloud says before it takes a machine back
    local id
    id=$(nodes 3 "${address[$1]}")
    on desk ray drain-node --address="${address[head]}:6379" --node-id="$id" --reason=DRAIN_NODE_REASON_PREEMPTION \
        --reason-message=reclaimed --deadline-remaining-seconds=120
}

gone() { # HOST
    power_off "$1"
    wait_for s3 nodes 2
}

champion() { # whether the run is the registered model's version that others should use
    on desk "$python" - <<'PY'
import mlflow
client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("e2e", "champion")
print(version.version, client.get_run(version.run_id).data.metrics["accuracy"])
PY
}

predicts() { # whether the served model knows the digits: at least 85 % of 200
    on desk "$python" - "http://${address[desk]}:5001/invocations" <<'PY'
import sys, numpy as np, requests
from sklearn.datasets import load_digits
digits = load_digits()
images = (digits.images[:200, None] / 16).astype(np.float32)
answer = requests.post(sys.argv[1], json={"inputs": images.tolist()}, timeout=60)
answer.raise_for_status()
found = answer.json()["predictions"]
accuracy = np.mean(np.argmax(found["scores"], axis=1) == digits.target[:200])
print("accuracy", accuracy, "features", np.shape(found["features"]))
sys.exit(int(accuracy < 0.85))
PY
}

run+=(--set 'data={path: s3://e2e/prepared, size: 8, channels: 1, test_fraction: 0.2}')
raw=(--set data.path=s3://e2e/images)
train=(python -m jobs.pretrain "${run[@]}" --run-dir "$run_dir" --set model.layers.1.train.epochs=60)
train+=(--set model.layers.1.out_channels=256 --set cluster.min_shards=1 --set cluster.start_timeout_s=60)
train+=(--set cluster.grow_after_s=1 --set tracking.register=e2e)

step "images in S3" images
doctor=(on desk "$python" -m jobs.doctor --submit "${run[@]}" "${raw[@]}" --run-dir "$run_dir")
step "jobs.doctor on every node" wait_for s3 "${doctor[@]}" # on a busy machine a node may not answer in time
submit prepare python -m jobs.prepare "${run[@]}" "${raw[@]}" --out s3://e2e/prepared
step "jobs.prepare: shards in S3" wait_for prepare succeeded prepare
submit train "${train[@]}"
step "jobs.submit: two shards on two workers" wait_for train says train "^ranks: "
step "a checkpoint in S3" wait_for train checkpoints 1
step "worker-2 is drained" drain worker-2
step "the run goes on with one shard" wait_for train says train "starting a new group of 1 rank"
step "worker-2 is gone" gone worker-2
step "worker-2 is back" join worker-2 3 "${worker[@]}"
step "two shards again" wait_for train says train "starting a new group of 2 ranks"
step "every port without the token" ports
step "the run to its end" wait_for train succeeded train
step "checkpoints in S3" checkpoints 1
submit again "${train[@]}"
step "the same command again: nothing to do" wait_for again succeeded again
step "the run says so" says again "already finished"
step "the registered model's champion" champion
start desk serve "$python" -m mlflow models serve --model-uri models:/e2e@champion --env-manager local \
    --host "${address[desk]}" --port 5001
step "a served prediction" wait_for serve predicts
