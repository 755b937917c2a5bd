# Copies folders while the containers that write them stand still: sh copy.sh INTO pause|stop "CONTAINER …" NAME=FOLDER …
# pause ends no connection; a host of a cluster has them stopped, since the others would wait for a frozen broker.
# One program on the host does it from beginning to end, so that nothing stays frozen, whatever becomes of who started it; a second one
# watches over its end. An engine that restarts meanwhile starts the containers as they were. Prints for how many seconds they stood still.
set -e
into=$1 how=$2 containers=$3
shift 3
case $how in
  pause) still=paused back=unpause ;;
  stop) still=exited back=start ;;
esac

frozen=
thaw() {
  for container in $frozen; do
    [ "$(docker inspect --format '{{.State.Status}}' "$container")" = $still ] || lost="$lost $container"
    docker $back "$container" >/dev/null
  done
  frozen=
}
trap thaw EXIT
trap 'exit 1' HUP INT TERM

# shellcheck disable=SC2086
setsid sh -c 'tail --pid=$1 --follow /dev/null; shift; docker "$@"' watch $$ $back $containers </dev/null >/dev/null 2>&1 &

start=$(date +%s)
for container in $containers; do
  # A broker hands its clients and the queues that it leads over to others; the other containers have no such program.
  [ $how = pause ] || docker exec "$container" rabbitmq-upgrade drain >/dev/null 2>&1 || true
  docker $how "$container" >/dev/null
  frozen="$frozen $container"
done
for folder; do
  tar --create --sparse --numeric-owner --file="$into/${folder%%=*}.tar" --directory="${folder#*=}" .
done
lost=
thaw
if [ "$lost" ]; then
  echo "$lost did not stand still: the copies are not of one moment" >&2
  exit 1
fi
echo $(($(date +%s) - start))
