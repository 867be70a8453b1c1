"""What records tell of a query and its answer, in GOST's form."""

from __future__ import annotations

from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype


def dns_fields(query: bytes, answer: bytes, *, cached: bool) -> dict[str, Any] | None:
    """Return the object `dns` of a record, None for what is no message with a question."""
    try:
        asked = dns.message.from_wire(query)
        said = dns.message.from_wire(answer)
        question = asked.question[0]
    except (dns.exception.DNSException, IndexError, ValueError):
        return None
    return {
        "id": asked.id,
        "name": question.name.to_text(),
        "class": dns.rdataclass.to_text(question.rdclass),
        "type": dns.rdatatype.to_text(question.rdtype),
        "question": message_text(asked),
        "answer": message_text(said),
        "cached": cached,
    }


def message_text(message: dns.message.Message) -> str:
    """Return a message as dig(1) shows it, which is how GOST records it; the OPT record only as a number."""
    flags = dns.flags.to_text(message.flags & ~0x7800).lower()
    opcode, rcode = dns.opcode.to_text(message.opcode()), dns.rcode.to_text(message.rcode())
    additional = len(message.additional) + (message.edns >= 0)
    lines = [
        f";; opcode: {opcode}, status: {rcode}, id: {message.id}",
        f";; flags: {flags}; QUERY: {len(message.question)}, ANSWER: {_count(message.answer)},"
        f" AUTHORITY: {_count(message.authority)}, ADDITIONAL: {additional}",
        "",
        ";; QUESTION SECTION:",
    ]
    for question in message.question:
        kind, of = dns.rdatatype.to_text(question.rdtype), dns.rdataclass.to_text(question.rdclass)
        lines.append(f";{question.name.to_text()}\t{of}\t {kind}")
    for title, section in (
        ("ANSWER", message.answer),
        ("AUTHORITY", message.authority),
        ("ADDITIONAL", message.additional),
    ):
        if section:
            lines += ["", f";; {title} SECTION:"]
            for rrset in section:
                kind, of = dns.rdatatype.to_text(rrset.rdtype), dns.rdataclass.to_text(rrset.rdclass)
                lines += [f"{rrset.name.to_text()}\t{rrset.ttl}\t{of}\t{kind}\t{item.to_text()}" for item in rrset]
    return "\n".join(lines) + "\n"


def _count(section: list[Any]) -> int:
    return sum(len(rrset) for rrset in section)
