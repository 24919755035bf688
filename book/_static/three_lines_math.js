// Ninety points near three lines, and what Parts I and II do to them: cratelab's functions for tokens of three
// dimensions and subspaces of one. tests/test_three_lines_page.py compares each with the library's.
// Points are rows [x, y, z]; lines are rows of length 1; atoms are rows, too.
const threeLines = (() => {
  "use strict";

  // matrix_exp of three_lines's skew matrix, and its noise in ten-thousandths, point by point.
  const TURN = [
    [0.5901750563253612, 0.5327574789784181, -0.6065170001606854],
    [-0.3117282958729949, 0.8434376619669923, 0.4375367183766098],
    [0.7446602396015751, -0.06915474653423781, 0.6638514506938358],
  ];
 
  const BESIDE = [
    -23104, -3733, -10608, 9995, -8840, -12755, -6232, -8664, -12956, 15236, 3237, 20177, 11357, -12269, 714,
    3380, 1535, -6333, -12609, -7270, -200, 2103, 1772, -8305, 10112, -2427, -7730, -15952, -6870, 14881, -4484,
    -8910, -917, 5563, -94, -12177, -12655, -11195, 11665, 9262, 6539, 1482, -11461, 18728, -3099, 2402, -13488,
    2444, -31453, -1137, 16962, -6652, -5872, 28321, 9040, 9478, -13809, -20548, 476, -3856, -2750, 8866, 14857,
    -79, -11288, -938, 9983, -826, 1825, 9509, -17632, 10107, 7495, -5606, 742, 19936, 4499, 15531, 540, 14744,
    -7012, 3263, -8739, 3941, 8915, 11732, -3949, 4464, -1727, 9751, 4165, -4987, -4755, 2863, -13182, 8887,
    -5919, 6195, -14873, 13627, 4188, 3434, -3486, -12091, 2071, -1173, -174, -2432, -4394, 27145, -14632, 4357,
    -5312, -1341, 13643, 2328, 11064, 8527, -6302, -6020, 11149, -5560, 5332, -1879, 3994, -6761, 16622, -6037,
    534, 134, -15406, -4819, 7623, 2168, -4789, -2579, 2631, -4053, -727, -1399, 7860, -20569, -6711, -4010,
    935, -6488, -6791, -838, -13083, -14174, 3237, -12819, -4118, -11129, -3920, -4523, 10930, -1639, -2015,
    -18610, 8942, -19664, 14865, -1983, -16795, 13863, -30466, -5983, 1168, 299, 8536, 9085, -11090, -6245,
    1361, -4219, -1030, -12869, 14145, 4473, -2069, 11507, -5612, 425, 8044, 9072, -2152, 5114, 8077, -13327,
    -2090, -6751, -8258, 3012, -8904, 5243, -15962, -3219, -15328, 7231, -3147, 2539, -10198, -9778, -4317,
    -22362, 11674, 13376, -17522, -4950, 4861, 6752, 16210, 3080, 1864, -4767, 13571, 8486, -4957, -542, 23797,
    7576, 8120, 3468, -995, -8179, 21964, 346, -2155, -14512, -3357, -1958, 6268, -3075, -16229, -9437, 6616,
    10204, -1945, -19840, -3717, -15157, -3728, 11356, -3960, -434, 11820, 5484, -4997, -3818, 12869, 331, 3443,
    5266, 12064, -4014, 9953, -5482, -10361, 5243, 15845, -13318, 18334, -1078, 7775, -6329, 6442, 4287, 17799,
    10672,
  ];

  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const mean = (values) => sum(values) / values.length;
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  const along = (a, factor) => [factor * a[0], factor * a[1], factor * a[2]];
  const plus = (a, b, factor = 1) => [a[0] + factor * b[0], a[1] + factor * b[1], a[2] + factor * b[2]];
  const times = (a, M) => [0, 1, 2].map((j) => a[0] * M[0][j] + a[1] * M[1][j] + a[2] * M[2][j]); // a row times M
  const squares = (z) => sum(z.map((point) => dot(point, point)));

  // Points, the line of each, and the lines: cratelab.three_lines.three_lines.
  function points(noise = 0.12, degrees = 35) {
    const cosine = Math.cos((degrees * Math.PI) / 180);
    const second = Math.sqrt(1 - cosine * cosine);
    const beside = (cosine - cosine * cosine) / second;
    const corner = [
      [1, 0, 0],
      [cosine, second, 0],
      [cosine, beside, Math.sqrt(1 - cosine * cosine - beside * beside)],
    ];
    const U = corner.map((row) => times(row, TURN));
    const line = Array.from({ length: 90 }, (_, i) => Math.floor(i / 30));
    const z = line.map((k, i) => {
      const place = (0.5 + (0.9 * (i % 15)) / 14) * (i % 30 < 15 ? 1 : -1);
      return plus(along(U[k], place), BESIDE.slice(3 * i, 3 * i + 3), noise / 10000);
    });
    return { z, line, U };
  }

  // The sum of the points' outer products, 3 by 3.
  function gram(z) {
    const M = [[0, 0, 0], [0, 0, 0], [0, 0, 0]];
    for (const point of z) for (let i = 0; i < 3; i++) for (let j = 0; j < 3; j++) M[i][j] += point[i] * point[j];
    return M;
  }

  const identityPlus = (M, factor) => M.map((row, i) => row.map((value, j) => factor * value + (i === j ? 1 : 0)));

  function cofactors(M) {
    const next = (i) => [(i + 1) % 3, (i + 2) % 3];
    return M.map((_, i) =>
      M.map((_, j) => {
        const [[a, b], [c, d]] = [next(i), next(j)];
        return M[a][c] * M[b][d] - M[a][d] * M[b][c];
      }),
    );
  }

  // The eigenvalues of a symmetric matrix, and its eigenvectors as rows, by Jacobi's rotations.
  function eigen(M) {
    const A = M.map((row) => [...row]);
    let V = [[1, 0, 0], [0, 1, 0], [0, 0, 1]];
    for (let sweep = 0; sweep < 30; sweep++) {
      const off = A[0][1] ** 2 + A[0][2] ** 2 + A[1][2] ** 2;
      if (off <= 1e-34 * (A[0][0] ** 2 + A[1][1] ** 2 + A[2][2] ** 2)) break;
      for (const [p, q] of [[0, 1], [0, 2], [1, 2]]) {
        if (A[p][q] === 0) continue;
        const angle = 0.5 * Math.atan2(2 * A[p][q], A[q][q] - A[p][p]);
        const [c, s] = [Math.cos(angle), Math.sin(angle)];
        for (const row of A) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
        [A[p], A[q]] = [plus(along(A[p], c), A[q], -s), plus(along(A[p], s), A[q], c)];
        [V[p], V[q]] = [plus(along(V[p], c), V[q], -s), plus(along(V[p], s), V[q], c)];
      }
    }
    return { values: A.map((row, i) => row[i]), vectors: V };
  }

  // Chapters 1 and 2: rates in nats a point, and their gradients.

  function codingRate(z, eps) {
    const M = identityPlus(gram(z), 3 / (z.length * eps * eps));
    return 0.5 * Math.log(dot(M[0], cofactors(M)[0]));
  }

  function codingRateGradient(z, eps) {
    const scale = 3 / (z.length * eps * eps);
    const M = identityPlus(gram(z), scale);
    const C = cofactors(M);
    const shrink = C.map((row) => along(row, scale / dot(M[0], C[0]))); // M is symmetric, and so are its cofactors
    return z.map((point) => times(point, shrink));
  }

  const energies = (z, U) => U.map((u) => sum(z.map((point) => dot(point, u) ** 2)));

  function subspaceRate(z, U, eps) {
    return 0.5 * sum(energies(z, U).map((energy) => Math.log1p(energy / (z.length * eps * eps))));
  }

  function subspaceRateGradient(z, U, eps) {
    const scale = 1 / (z.length * eps * eps);
    const weights = energies(z, U).map((energy) => scale / (1 + scale * energy));
    return z.map((point) => weighted(U, U.map((u, k) => weights[k] * dot(point, u))));
  }

  // The sum of rows times weights.
  function weighted(rows, weights) {
    const out = [0, 0, 0];
    rows.forEach((row, k) => {
      for (let i = 0; i < 3; i++) out[i] += weights[k] * row[i];
    });
    return out;
  }

  function nearestLine(z, U) {
    return z.map((point) => {
      const lengths = U.map((u) => Math.abs(dot(point, u)));
      return lengths.indexOf(Math.max(...lengths));
    });
  }

  // The best line through each group; one without points stays.
  function fitted(z, group, U) {
    return U.map((u, k) => {
      const members = z.filter((_, i) => group[i] === k);
      if (!members.length) return u;
      const { values, vectors } = eigen(gram(members));
      return vectors[values.indexOf(Math.max(...values))];
    });
  }

  function normalised(z, length = 1) {
    return z.map((point) => along(point, length / Math.max(Math.hypot(...point), 1e-12)));
  }

  // Chapter 2's climb of ΔR − λ‖Z‖₁ with refitted lines, by points of length 1: {z, U} before it and after each step.
  function climb(z, line, { steps = 60, stepSize = 1.8, lam = 0, eps = 0.5 } = {}) {
    const softened = (x) => Math.sign(x) * Math.max(Math.abs(x) - stepSize * lam, 0);
    let U = fitted(z, line, [0, 1, 2].map(() => [0, 0, 0]));
    const history = [{ z, U }];
    for (let step = 0; step < steps; step++) {
      const whole = codingRateGradient(z, eps);
      const parts = subspaceRateGradient(z, U, eps);
      z = z.map((point, i) => plus(point, plus(whole[i], parts[i], -1), stepSize).map(softened));
      z = normalised(z);
      U = fitted(z, nearestLine(z, U), U);
      history.push({ z, U });
    }
    return history;
  }

  const norm1 = (z) => sum(z.map((point) => sum(point.map(Math.abs))));
  const nearZero = (z) => mean(z.flat().map((x) => (Math.abs(x) < 1e-3 ? 1 : 0)));

  // Chapter 3: steps that compress.

  function compressionStep(z, U, stepSize, eps) {
    const gradient = subspaceRateGradient(z, U, eps);
    return z.map((point, i) => plus(point, gradient[i], -stepSize));
  }

  function softmax(values) {
    const largest = Math.max(...values);
    const powers = values.map((value) => Math.exp(value - largest));
    const total = sum(powers);
    return powers.map((power) => power / total);
  }

  // The probability of each line for each point, if points are N(0, 1) along a line and noise of size sigma is added.
  function membership(z, U, sigma) {
    const scale = 1 / (2 * sigma ** 2 * (1 + sigma ** 2));
    return z.map((point) => softmax(U.map((u) => scale * dot(point, u) ** 2)));
  }

  // The mean of the clean point, given the noisy one: a softmax over subspaces. Without noise they are the same.
  function denoise(z, U, sigma) {
    if (sigma === 0) return z;
    const member = membership(z, U, sigma);
    return z.map((point, i) =>
      weighted(U, U.map((u, k) => (member[i][k] * dot(point, u)) / (1 + sigma ** 2))),
    );
  }

  // A softmax over tokens: cratelab.mssa.
  function mssa(z, U) {
    const out = z.map(() => [0, 0, 0]);
    for (const u of U) {
      const w = z.map((point) => dot(point, u));
      const [least, most] = [Math.min(...w), Math.max(...w)];
      w.forEach((query, i) => {
        const largest = query * (query > 0 ? most : least); // a plain loop: thousands of weights a step
        let [total, attended] = [0, 0];
        for (const key of w) {
          const weight = Math.exp(query * key - largest);
          total += weight;
          attended += weight * key;
        }
        out[i] = plus(out[i], u, attended / total);
      });
    }
    return out;
  }

  // The points after a step along `update`, as long as this share of their own length.
  function moved(z, update, share) {
    const length = Math.sqrt(squares(update));
    const factor = length > 0 ? (share * Math.sqrt(squares(z))) / length : 0;
    return z.map((point, i) => plus(point, update[i], factor));
  }

  // The same towards a target, and no further.
  function movedTowards(z, target, share) {
    const way = z.map((point, i) => plus(target[i], point, -1));
    return squares(way) <= share ** 2 * squares(z) ? target : moved(z, way, share);
  }

  // The part of a point's squared length that lies outside its own line, on average; points at the origin have none.
  // Beside each point's own line; without labels, beside the line nearest to it, as chapter 3 has it.
  function strayShare(z, U, line) {
    const inside = (point, i) => Math.max(...(line ? [U[line[i]]] : U).map((u) => dot(point, u) ** 2));
    const shares = z.map((point, i) => Math.max(1 - inside(point, i) / dot(point, point), 0));
    return mean(shares.filter((share) => !Number.isNaN(share)));
  }

  // Chapter 4: sparse codes in a dictionary of atoms.

  const atoms = (U) => [...U, ...U.map((u) => along(u, -1))];
  const decode = (code, D) => code.map((weights) => weighted(D, weights));

  function ista(z, D, stepSize, lam, steps) {
    return z.map((point) => {
      let code = D.map(() => 0);
      for (let step = 0; step < steps; step++) {
        const residual = plus(point, weighted(D, code), -1);
        code = code.map((a, k) => Math.max(a + stepSize * dot(residual, D[k]) - stepSize * lam, 0));
      }
      return code;
    });
  }

  function lassoObjective(z, code, D, lam) {
    const decoded = decode(code, D);
    return z.map((point, i) => {
      const error = plus(point, decoded[i], -1);
      return 0.5 * dot(error, error) + lam * sum(code[i].map(Math.abs));
    });
  }

  const active = (code) => mean(code.map((weights) => weights.filter((a) => a !== 0).length));

  // Chapter 5: one layer, whose norm gives every point the length √3. Points after each half, and the code.
  function layer(z, U, { kappa = 0.3, lam = 0.1, stepSize = 0.1, steps = 2 } = {}) {
    const attended = mssa(normalised(z, Math.sqrt(3)), U);
    const half = z.map((point, i) => plus(point, attended[i], kappa));
    const code = ista(normalised(half, Math.sqrt(3)), atoms(U), stepSize, lam, steps);
    return { half, code, full: decode(code, atoms(U)) };
  }

  return {
    ...{ points, gram, eigen, codingRate, codingRateGradient, subspaceRate, subspaceRateGradient, nearestLine },
    ...{ fitted, normalised, climb, norm1, nearZero, compressionStep, membership, denoise, mssa, moved, movedTowards },
    ...{ strayShare, atoms, decode, ista, lassoObjective, active, layer, mean, squares, dot, plus, along },
  };
})();
