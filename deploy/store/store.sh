#!/bin/sh
# Run and check the store, whichever of Redis and Valkey the image holds: store.sh serve|check plain|tls
set -eu
conf=/etc/store/store.conf
tls=
if [ "$2" = tls ]; then
    conf=/etc/store/store-tls.conf
    tls='--tls --cacert /run/secrets/store-ca'
fi
case $1 in
serve)
    exec "$(command -v valkey-server || command -v redis-server)" "$conf"
    ;;
check)
    # As the observer, who may look and nothing else. The password is no argument, which everybody on the machine could read.
    REDISCLI_AUTH=$(cat /run/secrets/observer)
    export REDISCLI_AUTH
    # shellcheck disable=SC2086 # several words are meant
    answer=$("$(command -v valkey-cli || command -v redis-cli)" $tls --user "$OBSERVER" --no-auth-warning ping)
    [ "$answer" = PONG ] || { echo "the store answers $answer"; exit 1; }
    ;;
esac
