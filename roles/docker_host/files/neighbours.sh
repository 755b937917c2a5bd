#!/bin/sh
# Before Docker 28, every published port answers other hosts at the container's own address too, and at 127.0.0.1, if they send such packets by
# this host. Two rules per stack drop them. They stand in DOCKER-USER, which the engine makes, asks first, and leaves as it is.
#
#   neighbours.sh close STACK BRIDGE   sets the rules for the bridge of the stack's network, and says which of them it had to set
#   neighbours.sh open STACK           removes them, and says which
#   neighbours.sh look STACK           changes nothing
#
# close and look end with 3, and say why, where the rules are without effect.
set -eu
action=$1 stack=$2 bridge=${3:-}
PATH=/usr/sbin:/sbin:$PATH
comment=message-broker-stack:$stack

# The stack's rules, as iptables -S shows them.
rules() {
  iptables -w -S DOCKER-USER 2>/dev/null | grep -- "--comment \"\{0,1\}$comment\"\{0,1\} " || true
}

# Removes rules: lines of iptables -S.
remove() {
  while read -r rule; do
    echo "removed: $rule"
    echo "$rule" | sed 's/^-A/-D/' | xargs iptables -w
  done
}

# Adds a rule, with these conditions, where it is missing.
add() {
  set -- "$@" -m comment --comment "$comment" -j DROP
  iptables -w -C DOCKER-USER "$@" 2>/dev/null && return
  iptables -w -I DOCKER-USER "$@"
  echo "added: $*"
}

without_effect() {
  echo "$1" >&2
  exit 3
}

command -v iptables >/dev/null || without_effect "there is no command iptables"
case $action in
  open)
    rules | remove
    exit
    ;;
  close)
    # At boot the engine has not made it yet; it takes one that is there.
    iptables -w -n -L DOCKER-USER >/dev/null 2>&1 || iptables -w -N DOCKER-USER
    # Of a network that was removed.
    rules | grep -v -- "-o $bridge " | remove
    # A connection that another host opened, and that no published port (DNAT) led here. Answers to the containers' own connections pass.
    add ! -i "$bridge" -o "$bridge" -m conntrack --ctdir ORIGINAL ! --ctstate DNAT
    # One that began with 127.0.0.1 and came from outside; the host's own never comes by here.
    add -o "$bridge" -m conntrack --ctorigdst 127.0.0.0/8
    ;;
esac
[ "$(rules | wc -l)" -eq 2 ] || without_effect "the rules are not set"
iptables -w -C FORWARD -j DOCKER-USER 2>/dev/null || \
  without_effect "no engine uses the chain DOCKER-USER: none runs yet, or iptables is false in its daemon.json"
