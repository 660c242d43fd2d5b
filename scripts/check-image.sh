#!/bin/sh
# Builds the Dockerfile and runs the image as an operator would: read-only, as a user without rights,
# no capabilities, no network beyond its own port. It must become healthy, answer a chat, show the
# page, write nowhere but in /tmp, and end with 0 on SIGTERM.
#
#   scripts/check-image.sh [ARGUMENT OF THE BUILD...]      such as --build-arg TORCH_INDEX_URL=...
#
# Uses podman or buildah, which need no daemon, else docker; prints "skipped: ..." where there is
# none, or where the base image cannot be had. Set BASE_TAR to a tar of a Debian root (mmdebstrap
# --variant=minbase bookworm base.tar) to build on that instead of an image of a registry.
set -eu
cd "$(dirname "$0")/.."
IMAGE=localhost/aerie-check
NAME=aerie-check-$$
PORT=${PORT:-18700}
SECONDS_TO_START=${SECONDS_TO_START:-300}
WORK=$(mktemp -d)
STARTED=

skip() {
    echo "skipped: $*"
    exit 0
}

fail() {
    echo "failed: $*" >&2
    exit 1
}

clean() {
    [ -z "$STARTED" ] || stop_server >/dev/null 2>&1 || true
    [ -z "${CONTAINER:-}" ] || buildah rm "$CONTAINER" >/dev/null 2>&1 || true
    rm -rf "$WORK"
}
trap clean EXIT

# Which tools there are, and which of them work here.
if command -v buildah >/dev/null && buildah info >/dev/null 2>&1; then
    BUILDER=buildah
elif command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    BUILDER=docker
else
    skip "neither buildah nor a docker that answers is here (apt install buildah podman)"
fi

build() {
    if [ "$BUILDER" = docker ]; then
        docker build --tag "$IMAGE" "$@" .
    else
        buildah build --isolation chroot --format docker --layers --tag "$IMAGE" "$@" .
    fi
}

base() {
    [ -n "${BASE_TAR:-}" ] || return 0
    if [ "$BUILDER" = docker ]; then
        docker import "$BASE_TAR" localhost/aerie-base >/dev/null
    else
        from=$(buildah from scratch)
        buildah add "$from" "$BASE_TAR" / >/dev/null
        buildah config --cmd /bin/sh "$from"
        buildah commit --rm "$from" localhost/aerie-base >/dev/null
    fi
}

base
[ -z "${BASE_TAR:-}" ] || set -- --build-arg BASE_IMAGE=localhost/aerie-base "$@"
if ! build "$@" >"$WORK/build" 2>&1; then
    if grep -qiE "pinging container registry|no such host|failed to resolve|TLS handshake|i/o timeout" "$WORK/build" &&
        [ -z "${BASE_TAR:-}" ]; then
        skip "the base image cannot be fetched: $(grep -iE 'registry|resolve|timeout' "$WORK/build" | tail -1)"
    fi
    tail -30 "$WORK/build" >&2
    fail "the image does not build"
fi
echo "built with $BUILDER"

# podman or docker run it as it will run. Where neither can (inside another container), buildah's
# chroot does: the same root, user and command, but it can make nothing read-only by itself.
RUNNER=
for each in docker podman; do
    [ "$each" != docker ] || [ "$BUILDER" = docker ] || continue
    command -v "$each" >/dev/null || continue
    if "$each" run --rm --read-only --network none "$IMAGE" version >"$WORK/tried" 2>&1; then
        RUNNER=$each
        break
    fi
done
if [ -z "$RUNNER" ]; then
    [ "$BUILDER" = buildah ] || fail "the image does not run: $(tail -1 "$WORK/tried")"
    echo "podman cannot run a container here ($(tail -1 "$WORK/tried" 2>/dev/null)): using buildah's chroot"
    RUNNER=chroot
fi

start_server() {
    if [ "$RUNNER" != chroot ]; then
        "$RUNNER" run --detach --name "$NAME" --publish "127.0.0.1:$PORT:8000" --read-only \
            --tmpfs /tmp:size=64m --cap-drop ALL --security-opt no-new-privileges "$IMAGE" >/dev/null
        return
    fi
    CONTAINER=$(buildah from "$IMAGE")
    root=$(buildah mount "$CONTAINER")
    mount --bind "$root" "$root"
    mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/tmp"
    mount -t proc proc "$root/proc"
    mkdir -p "$root/dev/shm"
    mount --bind /dev "$root/dev"
    mount -o remount,bind,ro "$root"
    set -- $(buildah config_environment 2>/dev/null) # none: read below
    buildah inspect --type image --format \
        '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$IMAGE" >"$WORK/environment"
    # The entry point and the command of the image, as its user, with its variables.
    env -i sh -c 'while read -r line; do [ -z "$line" ] || export "$line"; done <"$1"
        export AERIE_SERVER__HOST=127.0.0.1 AERIE_SERVER__PORT="$3"
        exec setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --inh-caps=-all \
            --bounding-set=-all chroot_as_user "$2"' sh "$WORK/environment" "$root" "$PORT"
}
