#!/usr/bin/env bash
# A private microphone and loudspeaker: a private PulseAudio daemon, used through ALSA's pulse plugin.
# No root, no kernel module, nothing but a unix socket; it ends by itself after CARD_MAX_S.
#
#   virtual_card.sh exec COMMAND...          run a command with the card, then take the card away
#   CARD_DIR=DIR virtual_card.sh start|stop  then `. DIR/env`; DIR/pid is the daemon's
#
# vmic   the microphone: hears what is played to the sink `vair`
# vspk   the loudspeaker: `parec --device=vspk.monitor` records what one would hear
# vmon   a microphone at the loudspeaker
# ECHO_MS=40 ECHO_VOLUME=70% adds the way from the loudspeaker to the microphone (70 % is -9 dB)
set -euo pipefail
CARD_MAX_S="${CARD_MAX_S:-600}"
ECHO_MS="${ECHO_MS:-}"
ECHO_VOLUME="${ECHO_VOLUME:-70%}"

write_settings() {
    mkdir -p "$CARD_DIR/home"
    chmod 700 "$CARD_DIR"
    cat > "$CARD_DIR/asound.conf" <<CONF
pcm.vmic { type pulse server "unix:$CARD_DIR/native" device "vmic" }
pcm.vspk { type pulse server "unix:$CARD_DIR/native" device "vspk" }
pcm.vmon { type pulse server "unix:$CARD_DIR/native" device "vspk.monitor" }
pcm.!default { type asym playback.pcm "vspk" capture.pcm "vmic" }
ctl.!default { type pulse server "unix:$CARD_DIR/native" }
CONF
    # Without norewinds a null sink starts up to two seconds late, or stalls.
    cat > "$CARD_DIR/card.pa" <<PA
load-module module-native-protocol-unix auth-anonymous=1 socket=$CARD_DIR/native
load-module module-null-sink sink_name=vspk rate=48000 channels=1 format=s16le norewinds=1
load-module module-null-sink sink_name=vair rate=48000 channels=1 format=s16le norewinds=1
load-module module-remap-source source_name=vmic master=vair.monitor channels=1 master_channel_map=mono channel_map=mono remix=no
PA
    if [ -n "$ECHO_MS" ]; then
        echo "load-module module-loopback source=vspk.monitor sink=vair latency_msec=$ECHO_MS" \
            "adjust_time=0 source_dont_move=true sink_dont_move=true" >> "$CARD_DIR/card.pa"
    fi
    # 40 ms is the least at which a busy machine of two cores had no underruns.
    echo "export PULSE_SERVER='unix:$CARD_DIR/native' ALSA_CONFIG_PATH='$CARD_DIR/asound.conf'" \
        "PULSE_LATENCY_MSEC=${PULSE_LATENCY_MSEC:-40} JACK_NO_START_SERVER=1" > "$CARD_DIR/env"
}

# A card's clock does not wait for a busy machine; without the right to it, `nice` goes on as it is.
start_once() {
    HOME="$CARD_DIR/home" XDG_RUNTIME_DIR="$CARD_DIR/home" PULSE_RUNTIME_PATH="$CARD_DIR/home" \
        nice -n -11 timeout -k 5 "$CARD_MAX_S" pulseaudio -n -F "$CARD_DIR/card.pa" --daemonize=no \
        --exit-idle-time=-1 --disable-shm=yes --use-pid-file=no --realtime=no --high-priority=no \
        --log-target="file:$CARD_DIR/pulse.log" </dev/null >"$CARD_DIR/pulse.out" 2>&1 &
    echo $! > "$CARD_DIR/pid"
    for _ in $(seq 100); do
        pactl info >/dev/null 2>&1 && break
        sleep 0.05
    done
    pactl list short sources 2>/dev/null | awk '{print $2}' | grep -qx vmic
}

start() {
    write_settings
    export PULSE_SERVER="unix:$CARD_DIR/native"
    for _ in 1 2 3; do
        if start_once; then
            if [ -n "$ECHO_MS" ]; then
                pactl set-sink-input-volume \
                    "$(pactl list short sink-inputs | awk 'NR==1{print $1}')" "$ECHO_VOLUME"
            fi
            return 0
        fi
        kill_daemon
    done
    cat "$CARD_DIR/pulse.log" "$CARD_DIR/pulse.out" >&2
    return 1
}

kill_daemon() {
    if [ -f "$CARD_DIR/pid" ]; then
        kill "$(cat "$CARD_DIR/pid")" 2>/dev/null || true # `timeout` passes it on
        rm -f "$CARD_DIR/pid" "$CARD_DIR/native"
    fi
}

need_packages() {
    local package missing=""
    for package in pulseaudio:pulseaudio pactl:pulseaudio-utils paplay:pulseaudio-utils; do
        command -v "${package%:*}" >/dev/null || missing="$missing ${package#*:}"
    done
    ls /usr/lib/*/alsa-lib/libasound_module_pcm_pulse.so >/dev/null 2>&1 || missing="$missing libasound2-plugins"
    if [ -n "$missing" ]; then
        echo "the virtual sound card needs:$(tr ' ' '\n' <<< "$missing" | sort -u | tr '\n' ' '); apt install them" >&2
        exit 1
    fi
}

case "${1:-}" in
    start) : "${CARD_DIR:?set CARD_DIR}"; start ;;
    stop)  : "${CARD_DIR:?set CARD_DIR}"; kill_daemon; rm -rf "$CARD_DIR" ;;
    exec)
        shift
        need_packages
        CARD_DIR="$(mktemp -d)"
        trap 'kill_daemon; rm -rf "$CARD_DIR"' EXIT
        start
        # shellcheck disable=SC1091
        . "$CARD_DIR/env"
        timeout -k 5 "$CARD_MAX_S" "$@"
        ;;
    *)
        echo "usage: $0 start|stop|exec COMMAND..." >&2
        exit 2
        ;;
esac
