# Copies folders while the containers that write them are frozen: sh copy.sh INTO "CONTAINER …" NAME=FOLDER …
# One program on the host does it from beginning to end, so that nothing stays frozen, whatever becomes of who started it; a second one
# watches over its end. An engine that restarts meanwhile starts the containers as they were. Prints for how many seconds they stood still.
set -e
into=$1 containers=$2
shift 2

frozen=
thaw() {
  for container in $frozen; do
    docker unpause "$container" >/dev/null || lost="$lost $container"
  done
  frozen=
}
trap thaw EXIT
trap 'exit 1' HUP INT TERM

# shellcheck disable=SC2086
setsid sh -c 'tail --pid=$1 --follow /dev/null; shift; docker unpause "$@"' watch $$ $containers </dev/null >/dev/null 2>&1 &

start=$(date +%s)
for container in $containers; do
  docker pause "$container" >/dev/null
  frozen="$frozen $container"
done
for folder; do
  tar --create --sparse --numeric-owner --file="$into/${folder%%=*}.tar" --directory="${folder#*=}" .
done
lost=
thaw
if [ "$lost" ]; then
  echo "$lost did not stay frozen: the copies are not of one moment" >&2
  exit 1
fi
echo $(($(date +%s) - start))
