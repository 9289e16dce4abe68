#!/bin/sh
# Run or check the store, Redis or Valkey, depending on the image: store.sh serve|check plain|tls
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
    # As the observer, who may only read. The password is not an argument, because all users of the machine could read it.
    REDISCLI_AUTH=$(cat /run/secrets/observer)
    export REDISCLI_AUTH
    # shellcheck disable=SC2086 # several words are meant
    answer=$("$(command -v valkey-cli || command -v redis-cli)" $tls --user "$OBSERVER" --no-auth-warning ping)
    [ "$answer" = PONG ] || { echo "the store answers $answer"; exit 1; }
    ;;
esac
