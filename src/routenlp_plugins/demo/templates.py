"""Wordings of the synthetic workload, common ones first; ``{slot}`` is filled at random."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

__all__ = ["CLAUSES", "COMPANIES", "FACTS", "INTENTS", "PLACES", "RISKS", "fill"]

SLOTS: Mapping[str, Sequence[str]] = {
    "card": ("card", "debit card", "credit card", "bank card", "new card"),
    "time": ("two weeks ago", "last Monday", "ten days ago", "on the 3rd", "a while back", "before the holidays"),
    "sum": ("20 euros", "$150", "£75", "300 dollars", "a small amount", "1,200 kronor"),
    "shop": ("the supermarket", "a petrol station", "an online shop", "the hotel", "a restaurant in Rome"),
    "place": ("Spain", "Canada", "Japan", "Norway", "Brazil"),
    "years": ("two years", "three years", "five years", "eighteen months"),
    "days": ("ten days", "thirty days", "five business days"),
    "party": ("the Recipient", "the Receiving Party", "the Contractor", "the Company"),
    "state": ("New York", "Delaware", "England and Wales", "California"),
    "hello": ("", "Hi, ", "Hello there. ", "Hey, ", "Good morning, ", "Quick question: "),
    "thanks": ("", "", " Thanks.", " Please help.", " Any idea?"),
}

INTENTS: Mapping[str, Sequence[str]] = {
    "card_arrival": (
        "{hello}my {card} has not arrived yet.{thanks}",
        "{hello}when will my {card} get here? I ordered it {time}.",
        "{hello}I ordered a {card} {time} and am still waiting.{thanks}",
        "Is my {card} on its way?",
        "{hello}the postman has brought nothing from you since {time}.",
    ),
    "lost_card": (
        "{hello}I lost my {card}.{thanks}",
        "{hello}I can't find my {card} anywhere, please block it.",
        "I think I left my {card} at {shop}.",
        "{hello}my wallet was stolen with the {card} in it.",
        "It must have slipped out of my pocket at {shop}, what now?",
    ),
    "declined_payment": (
        "{hello}my payment at {shop} was declined.{thanks}",
        "Why was my {card} refused at {shop}?",
        "{hello}the terminal at {shop} did not accept my {card}.",
        "I could not pay {sum} although there is money on the account.",
        "At {shop} it just said no, quite embarrassing.",
    ),
    "exchange_rate": (
        "{hello}what exchange rate do you use?",
        "Which rate do I get when I pay in {place}?",
        "{hello}the exchange rate for my payment at {shop} looks wrong.",
        "How is {sum} converted into my currency?",
        "I was abroad and the sum came out higher than what I worked out myself.",
    ),
    "transfer_pending": (
        "{hello}my transfer of {sum} is still pending.{thanks}",
        "How long does a transfer to {place} take?",
        "{hello}I sent {sum} {time} and it has not arrived.",
        "The money I transferred is not in my friend's account.",
        "My landlord in {place} says nothing came in since {time}.",
    ),
    "refund_request": (
        "{hello}I want a refund for {sum} paid at {shop}.",
        "How do I get my money back from {shop}?",
        "{hello}{shop} has not refunded me yet.{thanks}",
        "I sent the goods back to {shop}; where is my {sum}?",
        "The parcel from {shop} was broken and I would rather have the cash.",
    ),
    "change_pin": (
        "{hello}how do I change my PIN?{thanks}",
        "I forgot the PIN of my {card}.",
        "{hello}can I choose my own PIN for the {card}?",
        "My PIN is blocked after three attempts.",
        "Those four digits won't stay in my head, may I pick others?",
    ),
    "close_account": (
        "{hello}I want to close my account.{thanks}",
        "How can I cancel my account with you?",
        "{hello}please delete my account and pay out {sum}.",
        "I am leaving for another bank.",
        "We are done, I don't want to be with you any longer.",
    ),
}

CLAUSES: Mapping[str, Sequence[str]] = {
    "confidentiality": (
        "{party} shall keep all Confidential Information strictly confidential.",
        "{party} shall not disclose Confidential Information to any third party without prior written consent.",
        "Confidential Information may be shared only with employees of {party} who need to know it.",
        "{party} shall protect such information with the same care as its own.",
        "No part of what is learned under this Agreement may be passed on by {party}.",
    ),
    "term": (
        "This Agreement shall remain in force for {years} from its date.",
        "The obligations of {party} shall survive for {years} after termination.",
        "The term of this Agreement is {years} and renews automatically.",
        "Either party may end this Agreement by giving {days} written notice.",
        "After {years} {party} shall be free of every duty named herein.",
    ),
    "governing_law": (
        "This Agreement shall be governed by the laws of {state}.",
        "The laws of {state} apply to this Agreement, without regard to conflicts of law.",
        "The courts of {state} shall have exclusive jurisdiction.",
        "Any dispute shall be brought before the courts of {state}.",
        "{party} agrees to be sued in {state} only.",
    ),
    "return_of_information": (
        "Upon termination {party} shall return all Confidential Information within {days}.",
        "{party} shall destroy all copies within {days} of a written request.",
        "All documents shall be returned or destroyed at the request of the Discloser.",
        "{party} shall certify the destruction of all notes in writing.",
        "Whatever was handed over goes back to its owner within {days}.",
    ),
    "liability": (
        "The liability of {party} shall not exceed the fees paid under this Agreement.",
        "{party} shall not be liable for indirect or consequential damages.",
        "{party} shall indemnify the other party against all claims.",
        "In no event shall {party} be liable for lost profits.",
        "Whoever breaks this Agreement makes good the loss, up to a year's fees.",
    ),
    "assignment": (
        "{party} may not assign this Agreement without prior written consent.",
        "This Agreement binds the successors and assigns of the parties.",
        "{party} shall not transfer its rights under this Agreement to any third party.",
        "Any assignment without consent is void.",
        "Nobody may step into the place of {party} unless the other agrees.",
    ),
}

RISKS: Mapping[str, Sequence[str]] = {
    "Entailment": (
        "Clause: {party} shall not disclose Confidential Information.\nStatement: {party} must keep it secret.",
        "Clause: {party} shall return all documents within {days}.\nStatement: {party} must give documents back.",
        "Clause: {party} may share information with its employees.\nStatement: Sharing with employees is allowed.",
        "Clause: The duties survive for {years}.\nStatement: Some duties outlive the agreement.",
        "Clause: {party} may retain one archival copy.\nStatement: {party} may keep some information.",
    ),
    "Contradiction": (
        "Clause: {party} may disclose information freely.\nStatement: {party} must keep it secret.",
        "Clause: {party} may retain all documents.\nStatement: {party} must give documents back.",
        "Clause: {party} shall not share information with anyone.\nStatement: Sharing with employees is allowed.",
        "Clause: All duties end with this Agreement.\nStatement: Some duties outlive the agreement.",
        "Clause: {party} shall destroy every copy.\nStatement: {party} may keep some information.",
    ),
    "NotMentioned": (
        "Clause: This Agreement is governed by the laws of {state}.\nStatement: {party} must keep it secret.",
        "Clause: Notices shall be in writing.\nStatement: {party} must give documents back.",
        "Clause: The term is {years}.\nStatement: Sharing with employees is allowed.",
        "Clause: {party} shall pay all fees within {days}.\nStatement: Some duties outlive the agreement.",
        "Clause: {party} shall not solicit employees for {years}.\nStatement: {party} may keep some information.",
    ),
}

FACTS: Mapping[str, Sequence[str]] = {
    "monthly fee": ("What is the monthly fee?", "What do I pay each month?"),
    "fee for a new card": ("What is the fee for a new card?", "I need another card, what will it cost?"),
    "fee for a cash withdrawal abroad": (
        "What is the fee for a cash withdrawal abroad?",
        "I am in Spain and need cash, does that cost anything?",
    ),
    "overdraft fee": ("What is the overdraft fee?", "What happens if I spend more than I have?"),
    "minimum balance": ("What is the minimum balance?", "How much must stay on the account?"),
}

COMPANIES = (
    "Alder Street Holdings",
    "Bright Harbour Inc",
    "Cobalt Freight Group",
    "Dunmore Savings Bank",
    "Elm Valley Trust",
    "First Lake Bank",
    "Granite Robotics",
    "Hollis and Partners",
)
PLACES = ("Boston", "Leeds", "Oslo", "Denver", "Lyon")


def fill(template: str, rng: random.Random) -> str:
    """A wording with each slot filled at random; the same slot twice gets the same words."""
    chosen: dict[str, str] = {}

    def words(match: re.Match[str]) -> str:
        return chosen.setdefault(match[1], rng.choice(SLOTS[match[1]]))

    text = re.sub(r"\{(\w+)\}", words, template)
    return text[:1].upper() + text[1:]
