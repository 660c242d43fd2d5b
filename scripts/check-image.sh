#!/bin/sh
# Builds the Dockerfile and runs the image as an operator would: with a read-only root, as a user
# without rights or capabilities. It must become ready and healthy, answer a chat, show the page, and
# end with 0 on SIGTERM.
#
#   scripts/check-image.sh [ARGUMENT OF THE BUILD...]      such as --build-arg TORCH_INDEX_URL=...
#
# Needs buildah and podman (apt install buildah podman runc), which want no daemon, or docker. Prints
# "skipped: ..." and succeeds where there are none, or where the base image cannot be fetched. With
# BASE_TAR, a tar of a Debian root (mmdebstrap --variant=minbase bookworm base.tar), it builds on
# that, without a registry of images.
set -eu
cd "$(dirname "$0")/.."
IMAGE=localhost/aerie-check
NAME=aerie-check-$$
PORT=${PORT:-18700}
URL=http://127.0.0.1:$PORT
WORK=$(mktemp -d)
RUN=

clean() {
    # shellcheck disable=SC2086  # RUN is a command with its options
    [ -z "$RUN" ] || $RUN rm --force "$NAME" >/dev/null 2>&1 || true
    rm -rf "$WORK"
}
trap clean EXIT

skip() {
    echo "skipped: $*"
    exit 0
}

fail() {
    # shellcheck disable=SC2086
    [ -z "$RUN" ] || $RUN logs "$NAME" 2>&1 | tail -20 >&2
    echo "failed: $*" >&2
    exit 1
}

works() {
    command -v "$1" >/dev/null && "$1" info >/dev/null 2>&1
}

if works buildah && works podman; then
    TOOL=podman
elif works docker; then
    TOOL=docker
else
    skip "neither buildah with podman nor a docker that answers is here"
fi

build() {
    if [ "$TOOL" = docker ]; then
        docker build --tag "$IMAGE" "$@" .
    else
        buildah build --isolation chroot --format docker --layers --tag "$IMAGE" "$@" .
    fi
}

if [ -n "${BASE_TAR:-}" ]; then
    if [ "$TOOL" = docker ]; then
        docker import "$BASE_TAR" localhost/aerie-base >/dev/null
    else
        from=$(buildah from scratch)
        buildah add "$from" "$BASE_TAR" / >/dev/null
        buildah commit --rm "$from" localhost/aerie-base >/dev/null 2>&1
    fi
    set -- --build-arg BASE_IMAGE=localhost/aerie-base "$@"
fi
if ! build "$@" >"$WORK/build" 2>&1; then
    cause=$(grep -iE 'pinging container registry|no such host|failed to resolve|short-name' "$WORK/build" | tail -1)
    [ -z "$cause" ] || [ -n "${BASE_TAR:-}" ] || skip "the base image cannot be fetched: $cause"
    tail -30 "$WORK/build" >&2
    fail "the image does not build"
fi
echo "built with $TOOL"

# Inside other containers and small virtual machines, crun and the limits that podman asks for may be
# refused; runc with lower limits is not.
LOW="--ulimit nofile=1024:1024 --ulimit nproc=1000:1000"
for each in "$TOOL" "$TOOL --runtime runc"; do
    for limits in "" "$LOW"; do
        # shellcheck disable=SC2086
        if $each run --rm $limits --read-only --network none "$IMAGE" version >"$WORK/tried" 2>&1; then
            RUN=$each
            break 2
        fi
    done
done
[ -n "$RUN" ] || skip "$TOOL cannot run a container here: $(tail -1 "$WORK/tried")"

# shellcheck disable=SC2086
$RUN run --detach --name "$NAME" $limits --publish "127.0.0.1:$PORT:8000" --read-only \
    --tmpfs /tmp:size=64m --cap-drop ALL --security-opt no-new-privileges "$IMAGE" \
    >/dev/null 2>"$WORK/tried" || fail "the image does not start: $(tail -1 "$WORK/tried")"

ask() {
    curl --silent --fail --noproxy '*' --max-time 60 "$@"
}

waited=0
until ask "$URL/ready" >/dev/null; do
    waited=$((waited + 1))
    [ "$waited" -lt "${SECONDS_TO_START:-180}" ] || fail "it is not ready after $waited s"
    sleep 1
done
echo "ready after about $waited s"

ask "$URL/health" >/dev/null || fail "/health"
ask "$URL/" | grep -qi "<html" || fail "there is no page at /"
ask "$URL/v1/chat/completions" --header 'content-type: application/json' --data '{
    "model": "smollm2-135m-instruct", "temperature": 0,
    "messages": [{"role": "user", "content": "Name the capital of France."}]}' |
    grep -q Paris || fail "the bundled model does not answer"
[ "$TOOL" = docker ] || $RUN healthcheck run "$NAME" >/dev/null 2>&1 || fail "the image's HEALTHCHECK"
id=$($RUN exec "$NAME" python -c 'import os; print(os.getuid())')
[ "$id" = 10001 ] || fail "it runs as user $id"
if $RUN exec "$NAME" python -c 'open("/opt/aerie/written", "w")' 2>/dev/null; then
    fail "its root can be written to"
fi

$RUN stop --time 60 "$NAME" >/dev/null 2>&1 || fail "it cannot be stopped"
code=$($RUN inspect --format '{{.State.ExitCode}}' "$NAME" 2>/dev/null)
[ "$code" = 0 ] || fail "it ended with $code"
echo "passed: chat, page, health, user 10001, read-only root, exit code 0 after SIGTERM"
