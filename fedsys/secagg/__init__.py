"""Secure aggregation: the server learns the sum of a cohort's updates, and no update.

    client u    y_u = q_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)    mod 2^k
    server      sum_u q_u = sum_u y_u - sum_u PRG(b_u) - what the masks s_uv of those lost left over

q_u is the clipped update in whole numbers. s_uv is what u and v agree on by Diffie-Hellman, so it
cancels in the sum; b_u hides y_u when it arrives after u was taken for lost. The keys behind both
are shared among the cohort, any t of whom can restore one of them: the key of s_u for a client
that was lost, b_u for one that was not, and never both.

Against a server that follows the protocol and looks at all it sees, alone or with fewer than t
clients. A server that invents clients or tells them different things is another matter: for that
clients need each other's identities from elsewhere (section 6.2 of the paper).

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
https://eprint.iacr.org/2017/281, Figure 4 without the steps against an active server. With
``neighbours``, Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead",
CCS 2020, https://eprint.iacr.org/2020/704, for a server of the same kind.
"""

from fedsys.secagg.quantise import Quantiser
from fedsys.secagg.rounds import SecureRound
from fedsys.secagg.server import SecAggError, Sum, TooFewClients
from fedsys.secagg.settings import SecureAggregation

__all__ = ["Quantiser", "SecAggError", "SecureAggregation", "SecureRound", "Sum", "TooFewClients"]
