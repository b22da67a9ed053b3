import torch

from mi_bounds import _checked, _plogq, entropy_z_given_x


def belief(D_xy, Q):
    D_xy, Q = _checked(D_xy=D_xy, Q=Q)
    total = D_xy.sum(-1, keepdim=True)
    even = torch.full_like(D_xy, 1 / D_xy.shape[-1])
    D_y = torch.where(total == 0, even, D_xy / total.clamp(min=1e-300))
    return (D_y.unsqueeze(-1) * Q).sum(-2)


def true_posterior(P, prior):
    P, prior = _checked(P=P, prior=prior)
    P = P.transpose(-1, -2)
    joint = P * prior.unsqueeze(-2)
    possible = joint.sum(-1, keepdim=True) > 0
    fallback = prior.unsqueeze(-2).expand_as(joint)
    joint = torch.where(possible, joint, fallback)
    return joint / joint.sum(-1, keepdim=True)


def exact_mi(P, prior, D_x):
    """E log P(y|x,z) / P(y|x)."""
    P, prior, D_x = _checked(P=P, prior=prior, D_x=D_x)
    P_y = (prior.unsqueeze(-1) * P).sum(-2, keepdim=True)
    inner = _plogq(P, P).sum(-1) - _plogq(P, P_y.expand_as(P)).sum(-1)
    return (D_x.unsqueeze(-1) * prior * inner).sum((-1, -2))


def phase1_objective(P, Q, prior, D_x):
    P, Q, prior, D_x = _checked(P=P, Q=Q, prior=prior, D_x=D_x)
    weight = D_x[..., None, None] * prior[..., None] * P
    log_Q = Q.transpose(-1, -2).log()
    return torch.where(weight > 0, weight * log_Q, 0.0).sum((-1, -2, -3))


def barber_agakov(P, Q, prior, D_x):
    return phase1_objective(P, Q, prior, D_x) + entropy_z_given_x(prior, D_x)


def barber_agakov_slack(P, Q, prior, D_x):
    """What is left of the information."""
    return exact_mi(P, prior, D_x) - barber_agakov(P, Q, prior, D_x)


def log_evidence(P, prior):
    P, prior = _checked(P=P, prior=prior)
    return torch.logsumexp(prior.log().unsqueeze(-1) + P.log(), dim=-2)


def elbo(P, Q, prior, beta=1.0):
    P, Q, prior = _checked(P=P, Q=Q, prior=prior)
    log_P = P.transpose(-1, -2).log()
    J = torch.where(Q > 0, Q * log_P, 0.0).sum(-1)
    if beta == 0:
        return J
    ratio = Q.log() - prior.log().unsqueeze(-2)
    return J - beta * torch.where(Q > 0, Q * ratio, 0.0).sum(-1)


def elbo_slack(P, Q, prior):
    posterior = true_posterior(P, prior)
    return (_plogq(Q.double(), Q.double()) - _plogq(Q.double(), posterior)).sum(-1)

