"""An nftables table as a whole: made, replaced and removed without a moment in which it is half there.

A set of intervals that is made in the same transaction as the rules that use it is empty for an instant after the
rules have come into force (Linux 6.18; seen as captured traffic that escapes during a reload). So the sets are
named by their content and made in a transaction before. And the chains stay where they are as long as their hook
does: of two base chains that take turns, a packet can pass the new one too early and the old one too late.
"""

from __future__ import annotations

from gostnet.core.errors import KernelError
from gostnet.core.resources import NftChain, NftRule, NftSet, NftTable

from .nft import Nft, Transaction

_CONTENT = "content_"
"""Beginning of the name of an empty chain, followed by the table's digest: what is observed is compared by it."""


def transactions(table: NftTable, before: NftTable | None) -> list[Transaction]:
    """Return what puts a table in place of `before`, whose content need not be known; to be done in order."""
    return _alteration(table, before) if before is not None and _alters(table, before) else _creation(table, before)


def removal(name: str) -> Transaction:
    """Return what removes a table if it is there."""
    transaction = Transaction()
    transaction.delete_table(name)
    return transaction


def words(table: NftTable, before: NftTable | None) -> list[str]:
    """Return the commands of nft(8) that have the same effect as putting the table.

    `flags owner` binds a table to the program that adds it: with nft itself it lasts as long as `nft -i` runs.
    """
    return [item.words for transaction in transactions(table, before) for item in transaction.items if item.words]


def put(nft: Nft, table: NftTable, before: NftTable | None) -> None:
    """Put a table. Raise KernelError, and have changed nothing that matters then."""
    sets, rest = transactions(table, before)
    nft.commit(sets)
    try:
        nft.commit(rest)
    except KernelError:
        nft.commit(_cleaning(table, before))
        raise


def comment_of(table: NftTable) -> str:
    """Return the comment that tells whose a table is."""
    return f"gostnet {table.note}".rstrip()


def digest_of(chains: list[str]) -> str:
    """Return the digest that a table with these chains was put with, "" if it is not of our making."""
    found = [name.removeprefix(_CONTENT) for name in chains if name.startswith(_CONTENT)]
    return found[0] if len(found) == 1 else ""


def _alters(table: NftTable, before: NftTable) -> bool:
    """Tell whether the table that is there can be changed, rather than made anew."""
    return bool(before.content) and (before.owner, before.note) == (table.owner, table.note)


def _creation(table: NftTable, before: NftTable | None) -> list[Transaction]:
    sets, rest = Transaction(), Transaction()
    if before is not None:
        sets.delete_table(table.name)
    sets.add_table(table.name, owner=table.owner, comment=comment_of(table))
    for statement in table.content:
        match statement:
            case NftSet():
                sets.add_set(table.name, statement)
            case NftChain():
                rest.add_chain(table.name, statement)
            case NftRule():
                rest.add_rule(table.name, statement)
    rest.add_chain(table.name, NftChain(_CONTENT + table.digest))
    return [sets, rest]


def _alteration(table: NftTable, before: NftTable) -> list[Transaction]:
    sets, rest = Transaction(), Transaction()
    old_sets, new_sets = _sets(before), _sets(table)
    old_chains, new_chains = _chains(before), _chains(table)
    for of in new_sets:
        if of not in old_sets:
            sets.add_set(table.name, of)
    rest.flush_table(table.name)
    for chain in old_chains:
        if chain not in new_chains:
            rest.delete_chain(table.name, chain.name)
    for chain in new_chains:
        if chain not in old_chains:
            rest.add_chain(table.name, chain)
    for statement in table.content:
        if isinstance(statement, NftRule):
            rest.add_rule(table.name, statement)
    for of in old_sets:
        if of not in new_sets:
            rest.delete_set(table.name, of.name)
    return [sets, rest]


def _cleaning(table: NftTable, before: NftTable | None) -> Transaction:
    """Return what removes what was made before the rules were refused."""
    if before is None or not _alters(table, before):
        return removal(table.name)
    cleaning = Transaction()
    for of in _sets(table):
        if of not in _sets(before):
            cleaning.delete_set(table.name, of.name)
    return cleaning


def _sets(table: NftTable) -> list[NftSet]:
    return [statement for statement in table.content if isinstance(statement, NftSet)]


def _chains(table: NftTable) -> list[NftChain]:
    """Return the chains, with the one that tells the digest."""
    chains = [statement for statement in table.content if isinstance(statement, NftChain)]
    return [*chains, NftChain(_CONTENT + table.digest)]
