/*! Rows of unsigned codes of 2, 3, 4 or 8 bits, packed so that a row unpacks by vector code.

A row of n codes, n a multiple of 8, is one or two planes; a plane of w bits a code has n w / 8 bytes, and code i lies in
byte `i mod (n w / 8)` from bit `w (i div (n w / 8))` on. Codes of 3 bits are a plane of their lower two bits and one of
their upper bit. */

/// The planes of a width: bits a code, and the bit of the code that the lowest of them is.
fn planes(bits: u8) -> &'static [(usize, u32)] {
    match bits {
        2 => &[(2, 0)],
        3 => &[(2, 0), (1, 2)],
        4 => &[(4, 0)],
        8 => &[(8, 0)],
        _ => panic!("codes of {bits} bits are not packed"),
    }
}

/// Bytes of a row of `codes` codes.
pub(super) fn row_bytes(bits: u8, codes: usize) -> usize {
    debug_assert!(codes.is_multiple_of(8));
    codes * usize::from(bits) / 8
}

/// Sets code `at` of the row.
pub(super) fn set(bits: u8, row: &mut [u8], at: usize, code: u8) {
    let codes = row.len() * 8 / usize::from(bits);
    let mut first = 0;
    for &(width, offset) in planes(bits) {
        let bytes = codes * width / 8;
        let byte = &mut row[first + at % bytes];
        let (shift, mask) = ((at / bytes * width) as u32, ((1u32 << width) - 1) as u8);
        *byte = *byte & !(mask << shift) | ((code >> offset) & mask) << shift;
        first += bytes;
    }
}

/// The codes of a row as numbers.
#[inline(always)]
pub(super) fn unpack(bits: u8, row: &[u8], codes: &mut [f32]) {
    let mut first = 0;
    for &(width, offset) in planes(bits) {
        let bytes = codes.len() * width / 8;
        let plane = &row[first..first + bytes];
        let mask = ((1u32 << width) - 1) as u8;
        for (part, codes) in codes.chunks_exact_mut(bytes).enumerate() {
            let shift = (part * width) as u32;
            for (code, byte) in codes.iter_mut().zip(plane) {
                let bits = ((byte >> shift) & mask) << offset;
                *code = if offset == 0 { 0.0 } else { *code } + f32::from(bits);
            }
        }
        first += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_and_a_set_one_changes_no_other() {
        for bits in [2, 3, 4, 8] {
            for count in [8, 16, 24, 64, 128] {
                let code = |at: usize, salt: usize| ((at * 37 + salt * 11) % (1 << bits)) as u8;
                let mut row = vec![0xa5; row_bytes(bits, count)];
                (0..count).for_each(|at| set(bits, &mut row, at, code(at, 1)));
                for (changed, salt) in [(3, 2), (count - 1, 5)] {
                    set(bits, &mut row, changed, code(changed, salt));
                    let mut found = vec![f32::NAN; count];
                    unpack(bits, &row, &mut found);
                    for (at, found) in found.iter().enumerate() {
                        let salt = match at {
                            3 => 2,
                            _ if at == changed => salt,
                            _ => 1,
                        };
                        assert_eq!(*found, f32::from(code(at, salt)), "{bits} bits, code {at}");
                    }
                }
            }
        }
    }
}
