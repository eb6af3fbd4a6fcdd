"""Checks before a run over several machines: addresses, interfaces, the cards' own network ports, timeouts.

The cards talk over their own RoCE ports, configured by `hccn_tool`; the host interfaces carry gloo, Ray and
the first handshake of HCCL. Both have to work. `-1` is never a card here: ids are those of `npu-smi`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ascend_kit.doctor.findings import Section
from ascend_kit.doctor.host import Host
from ascend_kit.doctor.variables import CONNECT_TIMEOUT_DEFAULT_S

SECTION = "Several machines"
INTERFACE_VARIABLES = ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
BASE_PORT_DEFAULT = 60000
NUM_BASE_PORTS = 16

# What a healthy card prints for `hccn_tool -i N <option> -g`, as words that are stable across releases.
_CARD_CHECKS = (
    ("link", "-link", r"link status:\s*UP", "check cable, optics and switch port (A3: --peers decides)"),
    ("net health", "-net_health", r"(net health status:\s*)?Success", "check the detection address and the gateway"),
    ("card address", "-ip", r"ipaddr:\s*\S+", "hccn_tool -i N -ip -s address A netmask M"),
    ("gateway", "-gateway", r"default gateway:\s*\S+", "hccn_tool -i N -gateway -s gateway G"),
    ("detection address", "-netdetect", r"netdetect address:\s*\S+", "hccn_tool -i N -netdetect -s address G"),
)


def wants_several_machines(host: Host, peers: Sequence[str]) -> bool:
    """Whether this looks like a run over several machines: peers named, or addresses and interfaces set."""
    names = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "RAY_ADDRESS")
    master = host.env.get("MASTER_ADDR", "")
    return bool(peers) or any(name in host.env for name in names) or master not in ("", "localhost", "127.0.0.1")


def check_network(host: Host, npu_ids: Sequence[int], peers: Sequence[str] = (), is_a3: bool = False) -> Section:
    """Findings on addresses, interfaces, timeouts; `peers` are card addresses on other machines to ping."""
    section = Section(SECTION)
    if not wants_several_machines(host, peers):
        section.na("all", "one machine: no peers given, no HCCL_IF_IP, RAY_ADDRESS or remote MASTER_ADDR")
        return section
    interfaces = _interfaces(host)
    _check_addresses(section, host, interfaces)
    _check_interfaces(section, host, interfaces)
    connect = host.env.get("HCCL_CONNECT_TIMEOUT")
    evidence = f"{connect} s, must be equal on all machines" if connect else f"default {CONNECT_TIMEOUT_DEFAULT_S} s"
    remedy = "export HCCL_CONNECT_TIMEOUT=1200 on all machines: loading weights may take longer than the default"
    section.judge("connect timeout", evidence, warn="" if connect else remedy)
    _check_ports(section, host)
    if npu_ids:
        _check_cards(section, host, npu_ids, peers, is_a3)
    return section


def _interfaces(host: Host) -> dict[str, list[str]]:
    """Interface name -> IPv4 addresses, from `ip -o -4 addr`; empty when the tool is missing."""
    found: dict[str, list[str]] = {}
    for line in host.run(["ip", "-o", "-4", "addr"]).stdout.splitlines():
        match = re.match(r"\d+:\s+(\S+)\s+inet\s+([\d.]+)", line)
        if match:
            found.setdefault(match.group(1), []).append(match.group(2))
    return found


def _check_addresses(section: Section, host: Host, interfaces: dict[str, list[str]]) -> None:
    own = {address for addresses in interfaces.values() for address in addresses}
    wanted = host.env.get("HCCL_IF_IP")
    listed = ", ".join(f"{name} {'/'.join(addresses)}" for name, addresses in interfaces.items() if name != "lo")
    if wanted is None:
        remedy = "export HCCL_IF_IP=<address the other machines reach> before `ray start`"
        section.warn("HCCL_IF_IP", f"not set; this machine has {listed or 'no address'}", remedy)
    elif own and wanted not in own:
        remedy = "each machine sets its own address"
        section.fail("HCCL_IF_IP", f"{wanted} is not an address of this machine ({listed})", remedy)
    else:
        section.ok("HCCL_IF_IP", wanted)
    name = host.hostname()
    address = host.resolve(name)
    is_reached = address is not None and not address.startswith("127.")
    remedy = (
        "gloo offers this address to its peers: give the name its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME"
    )
    section.judge("host name", f"{name} resolves to {address or 'nothing'}", warn="" if is_reached else remedy)


def _check_interfaces(section: Section, host: Host, interfaces: dict[str, list[str]]) -> None:
    wanted = host.env.get("HCCL_IF_IP")
    guess = next((name for name, addresses in interfaces.items() if wanted in addresses), "<interface>")
    for variable in INTERFACE_VARIABLES:
        value = host.env.get(variable)
        if value is None:
            remedy = f"export {variable}={guess} before `ray start`: workers inherit its environment"
            section.warn(variable, "not set", remedy)
            continue
        names = [name.strip().lstrip("=") for name in value.split(",") if not name.startswith("^")]
        missing = [name for name in names if not any(have.startswith(name) for have in interfaces)]
        if interfaces and missing:
            section.fail(variable, f"{value}: no such interface here", f"this machine has {', '.join(interfaces)}")
        else:
            section.ok(variable, value)


def _check_ports(section: Section, host: Host) -> None:
    """HCCL listens on a short range; another program may be handed one of its ports first."""
    text = host.env.get("HCCL_IF_BASE_PORT", str(BASE_PORT_DEFAULT))
    if not text.isdigit() or not 1024 <= int(text) <= 65520:
        section.fail("base port", f"HCCL_IF_BASE_PORT={text!r}", "a port from 1024 to 65520")
        return
    base = int(text)
    window = [int(word) for word in (host.read("/proc/sys/net/ipv4/ip_local_port_range") or "").split()]
    reserved = (host.read("/proc/sys/net/ipv4/ip_local_reserved_ports") or "").strip()
    ports = f"{base}-{base + NUM_BASE_PORTS - 1}"
    if len(window) == 2 and window[0] <= base + NUM_BASE_PORTS - 1 and base <= window[1] and not reserved:
        evidence = f"{ports} lies in the range of outgoing connections ({window[0]}-{window[1]})"
        section.warn("base port", evidence, f"sysctl -w net.ipv4.ip_local_reserved_ports={ports}")
    else:
        section.ok("base port", ports)


def _check_cards(section: Section, host: Host, npu_ids: Sequence[int], peers: Sequence[str], is_a3: bool) -> None:
    if not host.exists("/etc/hccn.conf"):
        remedy = "configure the card ports with hccn_tool; in a container mount /etc/hccn.conf"
        section.fail("/etc/hccn.conf", "missing", remedy)
    else:
        section.ok("/etc/hccn.conf", "present")
    tool = host.which("hccn_tool") or "/usr/local/Ascend/driver/tools/hccn_tool"
    if not host.exists(tool):
        section.fail("hccn_tool", "not found", "comes with the driver; in a container mount it and put it on PATH")
        return

    def ask(*options: str) -> dict[int, str]:
        return {npu: host.run([tool, "-i", str(npu), *options]).text for npu in npu_ids}

    for check, option, healthy, remedy in _CARD_CHECKS:
        _report_cards(section, check, ask(option, "-g"), healthy, remedy)
    _check_tls(section, ask("-tls", "-g"))
    ping, received = "-hccs_ping" if is_a3 else "-ping", r"[1-9]\d* received|recv seq|ping success"
    remedy = "check addresses, netmasks and the switch; both ends must be in one network or have a gateway"
    for peer in peers:
        _report_cards(section, f"ping {peer}", ask(ping, "-g", "address", peer), received, remedy)


def _report_cards(section: Section, check: str, outputs: dict[int, str], healthy: str, remedy: str) -> None:
    bad = [npu for npu, text in outputs.items() if not re.search(healthy, text, re.IGNORECASE)]
    if not bad:
        section.ok(check, f"{len(outputs)} of {len(outputs)} cards")
        return
    words = outputs[bad[0]].strip().splitlines()
    shown = words[-1][:80] if words else "no output"
    section.fail(check, f"cards {', '.join(map(str, bad))}: {shown}", remedy)


def _check_tls(section: Section, outputs: dict[int, str]) -> None:
    pattern = r"tls (?:switch|status)\s*\[?:?\s*(\w+)"
    found = {npu: re.search(pattern, text, re.IGNORECASE) for npu, text in outputs.items()}
    states = {npu: match[1] if match else "unknown" for npu, match in found.items()}
    if len(set(states.values())) > 1:
        remedy = "hccn_tool -i N -tls -s enable 0 (or 1) on every card of every machine"
        section.fail("tls", ", ".join(f"{npu}: {state}" for npu, state in states.items()), remedy)
    elif "unknown" in states.values():
        remedy = "compare `hccn_tool -i N -tls -g` on all machines: must be equal"
        section.warn("tls", "setting could not be read", remedy)
    else:
        section.ok("tls", f"{next(iter(states.values()))} on every card here; must be equal on all machines")
