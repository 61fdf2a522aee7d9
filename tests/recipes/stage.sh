# What a recipe finds: a home of its own at /root, an /etc, /usr/local, /run and /mnt that nobody else sees,
# `vellum` with an empty store, and other hosts under the names that pages give them.
set -eE -o pipefail
PATH=$PATH:/usr/sbin:/sbin

cleanup() {
    local status=$?
    set +eEx
    trap - EXIT ERR
    cd /
    local job
    for job in $(jobs -p); do
        kill "$job" 2>/dev/null
    done
    wait
    local root container
    for root in "$STAGE"/store "$STAGE"/store-of-* "$VELLUM_ROOT"; do
        [ -e "$root/vellum.json" ] || continue
        for container in $(vellum --root "$root" ps -q); do
            vellum -q --root "$root" rm --force --snapshots "$container" >&2
        done
    done
    exit $status
}
trap cleanup EXIT

mkdir "$STAGE"/{bin,home,over}
touch "$STAGE/bin/vellum"
mount --bind "$VELLUM" "$STAGE/bin/vellum"
PATH=$STAGE/bin:$PATH
mount -t tmpfs recipes "$STAGE/over"
mkdir "$STAGE"/over/{etc,local,etc/upper,etc/aside,local/upper,local/aside}
mount -t overlay -o "lowerdir=/etc,upperdir=$STAGE/over/etc/upper,workdir=$STAGE/over/etc/aside" recipes /etc
mount -t overlay -o "lowerdir=/usr/local,upperdir=$STAGE/over/local/upper,workdir=$STAGE/over/local/aside" \
    recipes /usr/local
mount -t tmpfs recipes /run
mount -t tmpfs recipes /mnt
mount --bind "$STAGE/home" /root
export HOME=/root
cd /root
busybox ip link set lo up 2>/dev/null || true
printf '127.0.0.1 %s\n' localhost storage1.example.com >>/etc/hosts

# Another host is another store here.
cat >"$STAGE/bin/ssh" <<'END'
#!/bin/sh
host=${1#*@}
shift
VELLUM_ROOT=$STAGE/store-of-$host exec sh -c "$*"
END
chmod +x "$STAGE/bin/ssh"

# A small root: busybox and its applets.
a_root() {
    [ ! -e "$STAGE/root" ] || return 0
    mkdir -p "$STAGE"/root/{bin,sbin,dev,etc,home,proc,root,run,srv,sys,tmp,usr/bin,usr/sbin,var/lib,var/log}
    cp "$(command -v busybox)" "$STAGE/root/bin/busybox"
    chroot "$STAGE/root" /bin/busybox --install -s
    echo 'root:x:0:0:root:/root:/bin/sh' >"$STAGE/root/etc/passwd"
    echo 'root:x:0:' >"$STAGE/root/etc/group"
    echo 12 >"$STAGE/root/etc/debian_version"
}

# Images of these names.
image() {
    a_root
    local name
    for name in "$@"; do
        vellum -q import "$name" "$STAGE/root" --size 256M >/dev/null
    done
}

# The store of the first chapter.
learn_store() {
    mkdir -p root/bin root/etc root/var/log
    cp /bin/busybox root/bin/ && chroot root /bin/busybox --install -s /bin
    echo 'Made to be changed.' >root/etc/motd
    vellum -q import busybox:1 root --size 1G >/dev/null
}

# Containers of these names.
container() {
    local name
    [ -e "$VELLUM_ROOT/vellum.json" ] && vellum images -q | grep -qx base || image base
    for name in "$@"; do
        vellum -q create base --name "$name" >/dev/null
    done
}

# Waits until a command succeeds.
until_ok() {
    local n
    for n in $(seq 200); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.1
    done
    echo "in vain: $*" >&2
    return 1
}

# Waits until a file has so many lines.
has_lines() { [ "$(wc -l <"$2")" -ge "$1" ]; }
printed() { until_ok has_lines "$@"; }
