"""Speech from text: any text data set, a small spoken question-answering set, and voices, rates, noise, rooms.

engines.py            a speech synthesiser is a command: flite, espeak-ng, or one of your own
debian.py             flite and espeak-ng from Debian archives, where none is installed; no root
speaking.py           texts x voices x rates -> a folder of speech with a manifest, in parallel, resumable
texts.py              texts from files, and WordNet's example sentences
passages.py           short passages of made-up facts with extractive questions
spoken_questions.py   those of them that the LLM can answer from the text, spoken
acoustics.py          noise at a known SNR, rooms of a known reverberation time
variants.py           the same speech under several conditions, and questions about the conditions
"""
