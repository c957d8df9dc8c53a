/*! Codes of 2, 3, 4 or 8 bits as bytes.

Each row is a little-endian bit stream: code k takes bits `k*bits .. (k+1)*bits` of the row, in two's
complement, and bit b of the row is bit b mod 8 of byte b div 8. So an INT4 byte holds the even
channel in its low half and the odd one in its high half. */

use rayon::prelude::*;

use crate::{Error, Result};

/// Rows packed by one task hold about this many codes.
const CODES_PER_TASK: usize = 1 << 18;

/// Bytes of one packed row.
pub fn row_bytes(columns: usize, bits: u8) -> usize {
    columns * usize::from(bits) / 8
}

/// Packs codes `[rows, columns]`, each in `-2^(bits-1)..2^(bits-1)`, to `[rows, columns*bits/8]`.
///
/// # Panics
/// If `codes` is not `rows * columns` long or a row does not fill whole bytes; the plan of a
/// linear, with channels in multiples of 16, rules both out.
pub fn pack(codes: &[i8], rows: usize, columns: usize, bits: u8) -> Vec<u8> {
    assert_eq!(codes.len(), rows * columns, "codes do not fill [{rows}, {columns}]");
    assert!(whole_bytes(columns, bits), "{columns} codes of {bits} bits do not fill bytes");
    let row = row_bytes(columns, bits);
    let mut bytes = vec![0u8; rows * row];
    if bytes.is_empty() {
        return bytes;
    }
    let rows_per_task = CODES_PER_TASK.div_ceil(columns);
    bytes
        .par_chunks_mut(row * rows_per_task)
        .zip(codes.par_chunks(columns * rows_per_task))
        // A row fills whole bytes, so adjacent rows are one longer stream.
        .for_each(|(bytes, codes)| pack_stream(codes, bits, bytes));
    bytes
}

/// Unpacks `[rows, columns*bits/8]` to codes `[rows, columns]`; an error if the bytes cannot be
/// that.
pub fn unpack(bytes: &[u8], rows: usize, columns: usize, bits: u8) -> Result<Vec<i8>> {
    if !whole_bytes(columns, bits) {
        let message = format!("{columns} codes of {bits} bits do not fill whole bytes");
        return Err(Error::input(message));
    }
    let row = row_bytes(columns, bits);
    if bytes.len() != rows * row {
        return Err(Error::input(format!(
            "codes [{rows}, {columns}] of {bits} bits need {} bytes, found {}",
            rows * row,
            bytes.len()
        )));
    }
    let mut codes = vec![0i8; rows * columns];
    if codes.is_empty() {
        return Ok(codes);
    }
    let rows_per_task = CODES_PER_TASK.div_ceil(columns);
    codes
        .par_chunks_mut(columns * rows_per_task)
        .zip(bytes.par_chunks(row * rows_per_task))
        .for_each(|(codes, bytes)| unpack_stream(bytes, bits, codes));
    Ok(codes)
}

fn whole_bytes(columns: usize, bits: u8) -> bool {
    matches!(bits, 2 | 3 | 4 | 8) && (columns * usize::from(bits)).is_multiple_of(8)
}

fn pack_stream(codes: &[i8], bits: u8, bytes: &mut [u8]) {
    match bits {
        8 => bytes.copy_from_slice(bytemuck::cast_slice(codes)),
        4 => {
            for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = pair[0] as u8 & 0xf | (pair[1] as u8) << 4;
            }
        }
        _ => {
            let (mut stream, mut filled) = (0u32, 0u32);
            let mut bytes = bytes.iter_mut();
            for &code in codes {
                stream |= (u32::from(code as u8) & ((1 << bits) - 1)) << filled;
                filled += u32::from(bits);
                if filled >= 8
                    && let Some(byte) = bytes.next()
                {
                    *byte = stream as u8;
                    stream >>= 8;
                    filled -= 8;
                }
            }
        }
    }
}

fn unpack_stream(bytes: &[u8], bits: u8, codes: &mut [i8]) {
    match bits {
        8 => codes.copy_from_slice(bytemuck::cast_slice(bytes)),
        4 => {
            for (pair, &byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
                // A shift of a signed value to the right repeats its sign.
                *pair = [(byte << 4) as i8 >> 4, byte as i8 >> 4];
            }
        }
        _ => {
            let (mut stream, mut filled) = (0u32, 0u32);
            let mut bytes = bytes.iter();
            for code in codes {
                if filled < u32::from(bits)
                    && let Some(&byte) = bytes.next()
                {
                    stream |= u32::from(byte) << filled;
                    filled += 8;
                }
                *code = (stream << (8 - bits)) as i8 >> (8 - bits);
                stream >>= bits;
                filled -= u32::from(bits);
            }
        }
    }
}

#[cfg(test)]
#[path = "packing_tests.rs"]
mod tests;
