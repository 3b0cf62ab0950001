// Parses the response of /explain, and encodes class indices as PNG, so that a download needs no second request.

// Returns the fields of the JSON text, and each array by its name as { data, shape }.
export function read(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const fields = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  for (const { name, shape } of fields.arrays) {
    const size = shape.reduce((a, b) => a * b, 1);
    fields[name] = { data: new Uint8Array(buffer, offset, size), shape };
    offset += size;
  }
  if (offset !== buffer.byteLength) throw new Error("the server's response is truncated");
  return fields;
}

// Returns an 8-bit grayscale PNG, with unfiltered rows, compressed by the browser.
export async function png(labels, height, width) {
  const rows = new Uint8Array(height * (width + 1));
  for (let y = 0; y < height; y++) rows.set(labels.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const compressed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  header[8] = 8;
  const data = new Uint8Array(await new Response(compressed).arrayBuffer());
  const signature = new Uint8Array([137, 80, 78, 71, 13, 10, 26, 10]);
  return new Blob([signature, chunk("IHDR", header), chunk("IDAT", data), chunk("IEND", new Uint8Array())], { type: "image/png" });
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(kind, data) {
  const bytes = new Uint8Array(data.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(data, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < data.length + 8; i++) crc = CRC[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  view.setUint32(data.length + 8, ~crc >>> 0);
  return bytes;
}
