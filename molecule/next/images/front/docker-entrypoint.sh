#!/bin/sh
# As the official image's: options are haproxy's, which runs as master and workers in the foreground.
case "$1" in
  -*) exec haproxy -W -db "$@" ;;
  haproxy) shift; exec haproxy -W -db "$@" ;;
esac
exec "$@"
