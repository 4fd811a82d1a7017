//! CRC-32C (Castagnoli), the checksum of packed images, checkpoints and TensorBoard's records.
//!
//!   crc(m) = the remainder of m by the polynomial 0x1edc6f41, bits reflected, begun and ended with an inversion
//!
//! Eight bytes at a time: table `k` holds what a byte followed by `k` zero bytes leaves.

const POLYNOMIAL: u32 = 0x82f6_3b78; // reflected

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut rest = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            rest = if rest & 1 == 1 { rest >> 1 ^ POLYNOMIAL } else { rest >> 1 };
            bit += 1;
        }
        tables[0][byte] = rest;
        byte += 1;
    }
    let mut at = 256;
    while at < 8 * 256 {
        let rest = tables[at / 256 - 1][at % 256];
        tables[at / 256][at % 256] = rest >> 8 ^ tables[0][(rest & 255) as usize];
        at += 1;
    }
    tables
}

/// The checksum of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    extend_crc32c(0, bytes)
}

/// The checksum of what `crc` is the checksum of, followed by `bytes`.
pub fn extend_crc32c(crc: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut crc = !crc;
    for word in words {
        let word = u64::from_le_bytes(*word) ^ u64::from(crc);
        let at = |byte: usize| TABLES[7 - byte][(word >> (8 * byte) & 255) as usize];
        crc = at(0) ^ at(1) ^ at(2) ^ at(3) ^ at(4) ^ at(5) ^ at(6) ^ at(7);
    }
    for &byte in rest {
        crc = crc >> 8 ^ TABLES[0][((crc ^ u32::from(byte)) & 255) as usize];
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answers of RFC 3720, B.4, and the check value of the catalogue of CRCs.
    #[test]
    fn published_answers_are_given() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[255; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| 31 - i as u8)), 0x113f_db5c);
    }

    #[test]
    fn pieces_give_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..100).map(|i| (i * 37 % 251) as u8).collect();
        for cut in 0..=bytes.len() {
            assert_eq!(extend_crc32c(crc32c(&bytes[..cut]), &bytes[cut..]), crc32c(&bytes), "cut at {cut}");
        }
    }
}
