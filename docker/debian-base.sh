#!/usr/bin/env bash
# Makes a base image from Debian's packages, for where no registry of images can be reached: debian-base.sh TAG
# A minimal bookworm with Python 3.11. Needs root, debootstrap and podman; kept in the cache for a month, as bases age.
set -euo pipefail
tag=$1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ppod/debian-base
archive=$cache/bookworm-$(cksum < "$0" | cut -d ' ' -f 1).tar

mkdir -p "$cache"
# Two checkouts may want it at once.
exec 9> "$cache/lock"
flock 9
find "$cache" -name 'bookworm-*.tar' -mtime +30 -delete
if [ ! -e "$archive" ]; then
    echo "making a base image from Debian's packages"
    root=$(mktemp -d "$cache/root-XXXXXX")
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" > "$cache/debootstrap.log" \
        || { tail "$cache/debootstrap.log" >&2; exit 1; }
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/usr/share/{doc,man,locale}/*
    # Of the host that made it, not of the image.
    rm -f "$root"/etc/{hostname,resolv.conf}
    tar -C "$root" -cf "$archive.part" . && mv "$archive.part" "$archive"
fi
# The same archive is the same image: what was built on it stays valid.
loaded=$cache/$(basename "$archive").image
if [ ! -e "$loaded" ] || ! podman image exists "$(cat "$loaded")"; then
    podman import --quiet "$archive" > "$loaded"
fi
podman tag "$(cat "$loaded")" "$tag"
