"""Fréchet distance between Gaussian fits of two sets of features (Heusel et al. 2017, FID).

`scipy.linalg` is imported where it is used: its third of a second would be a tenth of the start of generate.py.
"""

import numpy as np

TOLERANCE = 1e-8  # relative error of the distance up to which the fast eigenvalues are trusted


def psd_factor(sigma):
    """A [D, r] with A·Aᵀ = sigma [D, D], r the numerical rank.

    Cholesky factorisation with pivoting, stopped once what remains is rounding noise (D·ε times the
    largest variance). Otherwise the noise of a rank-deficient matrix, of size ε, would enter the square
    roots below as √ε for every missing dimension.
    """
    if not sigma.diagonal().max(initial=0) > 0:
        return np.zeros([len(sigma), 0])
    from scipy.linalg import lapack
    L, pivots, rank, _ = lapack.dpstrf(np.asarray(sigma, order='F'), lower=1)
    A = np.empty([len(sigma), rank])
    A[pivots - 1] = np.tril(L)[:, :rank]
    return A


def singular_values_fast(M):
    """(singular values, standard error of their sum) from the eigenvalues λ of the smaller of Mᵀ·M and M·Mᵀ.

    Four times faster than an SVD. The symmetric solver leaves an error of about ε·λ_max in every λ,
    hence ε·λ_max/(2√λ) in √λ: harmless unless some λ are tiny, which the error shows.
    """
    M = M if M.shape[0] >= M.shape[1] else M.T
    eigenvalues = np.linalg.eigvalsh(M.T @ M)
    if eigenvalues[0] <= 0:
        return np.sqrt(eigenvalues.clip(min=0)), np.inf
    error = np.finfo(np.float64).eps * eigenvalues[-1] / 2 * np.sqrt((1 / eigenvalues).sum())
    return np.sqrt(eigenvalues), error


def frechet_distance(mu, sigma, mu_r, sigma_r, tolerance=TOLERANCE):
    """|mu − mu_r|² + tr(sigma + sigma_r − 2·sqrtm(sigma·sigma_r)) ≥ 0, as a float.

    With sigma = A·Aᵀ and sigma_r = B·Bᵀ the non-zero eigenvalues of sigma·sigma_r are those of the
    symmetric matrix Mᵀ·M, M = Aᵀ·B, so the trace of the root is the sum of M's singular values. An SVD
    (always accurate) takes over where the eigenvalues of Mᵀ·M would cost more than `tolerance`.

    Args:
        mu, mu_r: Means [D].
        sigma, sigma_r: Covariances [D, D], symmetric positive semi-definite, of any rank.
        tolerance: Relative error allowed for the fast method; 0 always takes the SVD.
    """
    mu, sigma, mu_r, sigma_r = (np.asarray(a, dtype=np.float64) for a in (mu, sigma, mu_r, sigma_r))
    separate = np.square(mu - mu_r).sum() + np.trace(sigma) + np.trace(sigma_r)
    M = psd_factor(sigma).T @ psd_factor(sigma_r)
    if M.size == 0:
        return float(separate)
    if tolerance > 0:
        values, error = singular_values_fast(M)
        distance = separate - 2 * values.sum()
        if 2 * error <= tolerance * distance:
            return float(distance)
    from scipy.linalg import svdvals
    return max(float(separate - 2 * svdvals(M).sum()), 0.0)


def score_fid(stats, ref, seed=0):
    """{'FID': distance} of two statistics with `mu` and `sigma`."""
    return {'FID': frechet_distance(stats['mu'], stats['sigma'], ref['mu'], ref['sigma'])}
